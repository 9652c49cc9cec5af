"""Rewriting expressions whose meaning hangs on a value: ``and``, ``or``, ``not``, ``a if b else c``, comprehensions, calls.

What is emitted evaluates each part as often, and in the order, that Python does, and asks the runtime what to do next. No
lambda is needed, so names keep their scopes.
"""

from __future__ import annotations

import ast
import re
from typing import Any, cast

from nnsight_hpc.tracing.block_names import CHANGES
from nnsight_hpc.tracing.block_templates import RUNTIME, constant, expression

_SURE = frozenset({"isinstance", "issubclass", "hasattr", "callable"})
_ITERABLES = frozenset({"range", "enumerate", "zip", "reversed"})
_OF_LISTS = frozenset({"list", "tuple", "sum", "len", "any", "all", "min", "max"})
_OF_SIZES = frozenset({
    "view", "reshape", "expand", "permute", "repeat", "tile", "zeros", "ones", "new_zeros", "new_ones",
})  # fmt: skip
_OF_TENSORS = frozenset({
    "stack", "cat", "concat", "concatenate", "hstack", "vstack", "dstack", "row_stack", "column_stack", "block_diag",
})  # fmt: skip
_ON_THEIR_FIRST = frozenset({"setattr", "delattr", "next"})
_IN_PLACE = re.compile(r"[a-z]\w*[a-z0-9]_")
_DISPLAYS = (ast.List, ast.Tuple, ast.Dict, ast.ListComp, ast.DictComp)


class Expressions(ast.NodeTransformer):
    """Rewrites expressions. `needed` says whether there was anything that may hang on a value."""

    def __init__(self) -> None:
        self.needed = False
        self.temporaries = 0
        self.gathers: list[str] = []
        self.containers: set[str] = set()
        self.depth = 0

    def temporary(self) -> str:
        self.temporaries += 1
        return f"__b{self.temporaries}__"

    def emit(self, text: str, at: ast.AST, **parts: ast.expr) -> ast.expr:
        self.needed = True
        return expression(text.replace("RT", RUNTIME), at, **parts)

    def expression(self, node: ast.expr) -> ast.expr:
        return cast("ast.expr", self.visit(node))

    def within(self, node: ast.expr) -> ast.expr:
        """An expression that is evaluated where a value decides."""
        self.depth += 1
        try:
            return self.expression(node)
        finally:
            self.depth -= 1

    def visit_Lambda(self, node: ast.Lambda) -> ast.expr:
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return self._stored(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        return self._stored(node)

    def _stored(self, node: ast.Attribute | ast.Subscript) -> ast.expr:
        root = _root(node.value)
        self.generic_visit(node)
        if self.depth and not isinstance(node.ctx, ast.Load):
            node.value = self._changed(node.value, root)
        return node

    def _changed(self, owner: ast.expr, root: ast.Name | None) -> ast.expr:
        """`owner`, which the runtime refuses if it is an object of Python's that cannot be changed where a value decides."""
        if root is None or root is owner:
            return self.emit("RT.owner(X)", owner, X=owner)
        return self.emit(
            "RT.owner(X, ROOT)", owner, X=owner, ROOT=ast.copy_location(ast.Name(root.id, ast.Load()), root)
        )

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        if surely_plain(node) or _names_inside(node.values[1:]):
            return cast("ast.expr", self.generic_visit(node))
        first, *rest = node.values
        later = rest[0] if len(rest) == 1 else ast.copy_location(ast.BoolOp(node.op, rest), rest[0])
        parts = {"A": self.expression(first), "B": self.within(later)}
        if isinstance(node.op, ast.And):
            return self.emit("RT.second(B) if RT.both(A) else RT.first()", node, **parts)
        return self.emit("RT.first() if RT.either(A) else RT.second(B)", node, **parts)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        if isinstance(node.op, ast.Not) and not surely_plain(node.operand):
            return self.emit("RT.not_(A)", node, A=self.expression(node.operand))
        return cast("ast.expr", self.generic_visit(node))

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        if surely_plain(node.test) or _names_inside([node.body, node.orelse]):
            return cast("ast.expr", self.generic_visit(node))
        parts = {"T": self.expression(node.test), "X": self.within(node.body), "Y": self.within(node.orelse)}
        text = "RT.chosen(RT.side(X) if RT.test(T) else None, RT.side(Y) if RT.otherwise() else None)"
        return self.emit(text, node, **parts)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        if len(node.ops) == 1 or _names_inside(node.comparators[1:]):
            return cast("ast.expr", self.generic_visit(node))
        operands = [self.expression(node.left), *map(self.within, node.comparators)]
        return self._chain(operands[0], node.ops, operands[1:], node)

    def _chain(self, left: ast.expr, ops: list[ast.cmpop], others: list[ast.expr], at: ast.Compare) -> ast.expr:
        if len(ops) == 1:
            return ast.copy_location(ast.Compare(left, ops, others), at)
        middle = self.emit("RT.middle(M)", at, M=others[0])
        first = ast.copy_location(ast.Compare(left, ops[:1], [middle]), at)
        rest = self._chain(self.emit("RT.again()", at), ops[1:], others[1:], at)
        return self.emit("RT.second(B) if RT.chain(A) else RT.first()", at, A=first, B=rest)

    def visit_ListComp(self, node: ast.ListComp) -> ast.expr:
        return self._gathered(node, "done")

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> ast.expr:
        return self._gathered(node, "generated")

    def _gathered(self, node: ast.ListComp | ast.GeneratorExp, end: str) -> ast.expr:
        plain = all(surely_plain_items(part.iter) and all(map(surely_plain, part.ifs)) for part in node.generators)
        if plain or any(part.is_async for part in node.generators):
            return cast("ast.expr", self.generic_visit(node))
        name = f"__g{len(self.gathers)}__"
        self.gathers.append(name)
        for part in node.generators:
            part.iter = self.emit(f"{name}.over(X)", part.iter, X=self.iterable(part.iter))
            part.ifs = [self.emit(f"{name}.guard(X)", test, X=self.within(test)) for test in part.ifs]
        node.elt = self.emit(f"{name}.entry(X)", node.elt, X=self.within(node.elt))
        return self.emit(f"{name}.open().{end}(X)", node, X=node)

    def visit_DictComp(self, node: ast.DictComp) -> ast.expr:
        return self._of_python(node, "a dict comprehension")

    def visit_SetComp(self, node: ast.SetComp) -> ast.expr:
        return self._of_python(node, "a set comprehension")

    def _of_python(self, node: ast.DictComp | ast.SetComp, what: str) -> ast.expr:
        """A comprehension that no value can decide about; the runtime says so."""
        for part in node.generators:
            if not surely_plain_items(part.iter):
                part.iter = self.emit(f"RT.of_python(X, {what!r})", part.iter, X=self.iterable(part.iter))
            part.ifs = [
                test if surely_plain(test) else self.emit(f"RT.of_python(X, {what!r})", test, X=test)
                for test in part.ifs
            ]
        return cast("ast.expr", self.generic_visit(node))

    def visit_List(self, node: ast.List) -> ast.expr:
        """``[*x, y]``: how many entries `x` has may be known only where the graph runs."""
        if isinstance(node.ctx, ast.Store) or not any(isinstance(entry, ast.Starred) for entry in node.elts):
            return cast("ast.expr", self.generic_visit(node))
        call = cast("ast.Call", self.emit("RT.listed()", node))
        call.args += map(self._starred, node.elts)
        return call

    def _starred(self, node: ast.expr) -> ast.expr:
        """An argument; one that is spread as such a thing for the runtime."""
        if not isinstance(node, ast.Starred):
            return self.expression(node)
        return self.emit("RT.star(X)", node, X=self.expression(node.value))

    def message(self, node: ast.expr) -> ast.expr:
        """The message of an ``assert`` as a list of its parts."""
        return ast.copy_location(ast.List(self._parts([node]), ast.Load()), node)

    def iterable(self, node: ast.expr) -> ast.expr:
        """What a loop runs over; ``range``, ``enumerate`` and ``zip`` of values are the runtime's."""
        if not _calls(node, _ITERABLES):
            return self.expression(node)
        assert isinstance(node, ast.Call)
        call = cast("ast.Call", self.emit("RT.iterable(F)", node, F=node.func))
        inner = self.iterable if node.func.id != "range" else self.expression  # type: ignore[attr-defined]
        call.args += [inner(argument) for argument in node.args]
        call.keywords = [self.visit(keyword) for keyword in node.keywords]
        return call

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if not self.depth:
            return self._called(node)
        if isinstance(node.func, ast.Attribute) and (node.func.attr in CHANGES or _IN_PLACE.fullmatch(node.func.attr)):
            root = _root(node.func.value)
            new = self._called(node)
            if new is node:
                node.func.value = self._changed(node.func.value, root)
            return new
        if _calls(node, _ON_THEIR_FIRST) and node.args:
            root = _root(node.args[0])
            self.generic_visit(node)
            node.args[0] = self._changed(node.args[0], root)
            return node
        return self._called(node)

    def _called(self, node: ast.Call) -> ast.expr:
        if _calls(node, {"print"}) and (self.depth or any(not isinstance(a, ast.Constant) for a in node.args)):
            return self._handed_on("RT.print(F)", node, self._parts(node.args))
        if isinstance(node.func, ast.Attribute):
            if node.func.attr == "log" and any(isinstance(a, ast.JoinedStr) for a in node.args):
                node.args = self._parts(node.args)
                node.func = self.expression(node.func)
                return node
            if node.func.attr == "save" and not node.args and self._is_container(node.func.value):
                return self.emit("RT.kept(X)", node, X=self.expression(node.func.value))
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _OF_SIZES and any(isinstance(a, ast.Starred) for a in node.args):
            return self._handed_on("RT.spread(F)", node, list(map(self._starred, node.args)))
        names = _OF_TENSORS if isinstance(node.func, ast.Attribute) else _OF_LISTS
        if name in names and node.args and not isinstance(node.args[0], ast.Starred):
            return self._handed_on("RT.call(F)", node, [self.expression(a) for a in node.args])
        return cast("ast.expr", self.generic_visit(node))

    def _handed_on(self, text: str, node: ast.Call, args: list[ast.expr]) -> ast.expr:
        call = cast("ast.Call", self.emit(text, node, F=node.func))
        call.args += args
        call.keywords = [self.visit(keyword) for keyword in node.keywords]
        return call

    def _parts(self, args: list[ast.expr]) -> list[ast.expr]:
        """The arguments of a line to print, with formatted strings as ``*parts``: text, and what is put between."""
        return [self._spread(a) if isinstance(a, ast.JoinedStr) else self.expression(a) for a in args]

    def _spread(self, node: ast.JoinedStr) -> ast.expr:
        call = cast("ast.Call", self.emit("RT.parts()", node))
        for value in node.values:
            if isinstance(value, ast.FormattedValue):
                spec = value.format_spec or constant("", value)
                parts = [self.expression(value.value), constant(value.conversion, value), self.expression(spec)]
                call.args.append(ast.copy_location(ast.Tuple(parts, ast.Load()), value))
            else:
                call.args.append(value)
        return ast.copy_location(ast.Starred(call, ast.Load()), node)

    def _is_container(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.containers
        return is_display(node)


def is_display(node: ast.AST | None) -> bool:
    """Whether the expression is surely a new list, tuple or dict."""
    return isinstance(node, _DISPLAYS) or (_calls(node, {"list", "dict"}) and not getattr(node, "args", None))


def surely_plain(node: ast.expr) -> bool:
    """Whether the truth of the expression can only be Python's own."""
    if isinstance(node, ast.Compare):
        return len(node.ops) == 1 and isinstance(node.ops[0], ast.Is | ast.IsNot | ast.In | ast.NotIn)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not) and surely_plain(node.operand)
    if isinstance(node, ast.BoolOp):
        return all(map(surely_plain, node.values))
    return isinstance(node, ast.Constant) or _calls(node, _SURE)


def surely_plain_items(node: ast.expr) -> bool:
    """Whether iterating over the expression can only be Python's own loop."""
    if _calls(node, _ITERABLES):
        assert isinstance(node, ast.Call)
        return all(isinstance(a, ast.Constant) or surely_plain_items(a) for a in node.args)
    return isinstance(node, ast.Constant | ast.List | ast.Tuple | ast.Set)


def _root(node: ast.expr) -> ast.Name | None:
    """The name `x` of ``x.a[0].b``."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node if isinstance(node, ast.Name) else None


def _calls(node: Any, names: frozenset[str] | set[str]) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _names_inside(nodes: list[ast.expr]) -> bool:
    """Whether the expressions bind names (``:=``), which would have to be merged."""
    return any(isinstance(inner, ast.NamedExpr) for node in nodes for inner in ast.walk(node))
