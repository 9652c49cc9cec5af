"""Reads a function's source and names the operations in it.

Every call that the function writes down is an operation: ``self.q_proj(x)`` is ``self_q_proj_0``, a second such call
``self_q_proj_1``. The number counts the calls of one callee in the order in which they run, inner ones first. Every
assignment ``h = a + b`` is one too (``h_0``), so that what operators make has a name; names that are also called have
numbers for their calls only. These are the names that nnsight gives (0.5 to 0.8).
"""

from __future__ import annotations

import ast
import copy
import difflib
import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from types import CodeType

OPERATION = "__operation__"
"""The name by which rewritten code reaches what stands in for its operations."""
_OF_THE_FRAME = frozenset({"super", "locals", "vars", "dir", "eval", "exec", "globals", "breakpoint"})
"""Functions that look at the frame that calls them: no operations, since another frame would call them."""


class Operation(NamedTuple):
    """A call or an assignment in a forward: its name, its line in the file, and the text of that line."""

    name: str
    line: int
    text: str


@dataclass(frozen=True)
class Parsed:
    """A function definition as read, with the operations in it.

    Attributes
    ----------
    callees
        For each operation, the expression of what it calls; None for an assignment.
    assigned
        For each name that is assigned as a whole, the values in source order.
    called
        What stands before the numbers of the operations that are calls.
    """

    definition: ast.FunctionDef | ast.AsyncFunctionDef
    file: str
    line: int
    text: str
    operations: tuple[Operation, ...]
    callees: Mapping[str, ast.expr | None]
    assigned: Mapping[str, list[ast.expr]]
    called: frozenset[str]

    def require(self, names: Iterable[str]) -> None:
        """Raise `InvalidGraph` with near names unless every one of `names` is an operation of this function."""
        for name in names:
            if name not in self.callees:
                near = difflib.get_close_matches(name, self.callees, n=3, cutoff=0.5)
                raise InvalidGraph(
                    f"{self.definition.name} has no operation {name!r}",
                    where=f"{self.file}:{self.line}",
                    why=f"it has {', '.join(self.callees) or 'none'}",
                    next=f"did you mean {', '.join(near)}?" if near else "",
                )


@functools.lru_cache(maxsize=1024)
def parse(code: CodeType) -> Parsed:
    """Read the function that `code` was compiled from; raises `InvalidGraph` where its source cannot be had."""
    definition, lines = _definition(code)
    called = _called(definition)
    namer = Namer(called)
    namer.visit_definition(copy.deepcopy(definition))
    first = definition.lineno
    return Parsed(
        definition=definition,
        file=code.co_filename,
        line=first,
        text="".join(lines),
        operations=tuple(Operation(name, line, lines[line - first].strip()) for name, line in namer.lines.items()),
        callees=namer.callees,
        assigned=_assigned(definition),
        called=called,
    )


def _definition(code: CodeType) -> tuple[ast.FunctionDef | ast.AsyncFunctionDef, list[str]]:
    """The definition and its lines, both without decorators; it has the line numbers of its file."""
    try:
        lines, first = inspect.getsourcelines(code)
        indented = lines[0][:1].isspace()
        tree = ast.parse("".join(["if True:\n", *lines] if indented else lines))
    except (OSError, SyntaxError) as error:
        raise without_source(code.co_name, f"{code.co_filename} does not give it: {error}") from None
    ast.increment_lineno(tree, first - 1 - indented)
    body = tree.body[0].body if indented and isinstance(tree.body[0], ast.If) else tree.body
    definition = body[0]
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef) or definition.name != code.co_name:
        reason = (
            "it is a lambda" if code.co_name == "<lambda>" else f"{code.co_filename} has changed since it was loaded"
        )
        raise without_source(code.co_name, reason)
    definition.decorator_list = []
    return definition, lines[definition.lineno - first :]


def _called(definition: ast.AST) -> frozenset[str]:
    return frozenset(dotted(node.func) for node in ast.walk(definition) if isinstance(node, ast.Call))


def _assigned(definition: ast.AST) -> dict[str, list[ast.expr]]:
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(definition):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(value := getattr(node, "value", None), ast.expr):
                found.setdefault(target.id, []).append(value)
    return found


def dotted(expression: ast.expr) -> str:
    """An expression's names joined: ``self.a[i].b`` is ``self_a_b``; of ``(x + y).sum`` the names on the right: ``sum``."""
    parts: list[str] = []
    while not isinstance(expression, ast.Name):
        if isinstance(expression, ast.Attribute):
            parts.append(expression.attr)
        elif not isinstance(expression, ast.Subscript):
            return "_".join(reversed(parts))
        expression = expression.value
    return "_".join(reversed([*parts, expression.id]))


def _rooted(expression: ast.expr) -> bool:
    """Whether there is a name at the left end of an expression of attributes and subscripts."""
    while isinstance(expression, ast.Attribute | ast.Subscript):
        expression = expression.value
    return isinstance(expression, ast.Name)


class Namer(ast.NodeTransformer):
    """Gives the operations of a definition their names, and puts a call of `OPERATION` in place of those in `wanted`.

    ``f(x)`` becomes ``__operation__("f_0", f, x)``, and ``h = a + b`` becomes ``h = __operation__("h_0", None, a + b)``.
    """

    def __init__(self, called: frozenset[str], wanted: Collection[str] = ()) -> None:
        self._called, self._wanted = called, wanted
        self._counts: dict[str, int] = {}
        self.lines: dict[str, int] = {}
        self.callees: dict[str, ast.expr | None] = {}

    def visit_definition(self, definition: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        """Visit the body: defaults and annotations are not part of a call."""
        definition.body = [self.visit(statement) for statement in definition.body]

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if isinstance(node.func, ast.Name) and node.func.id in _OF_THE_FRAME:
            self.generic_visit(node)
            return node
        callee = copy.deepcopy(node.func)
        self.generic_visit(node)
        name = self._name(dotted(node.func) or "call", node, callee)
        return self._through(name, node, [node.func, *node.args], node.keywords)

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        node.value = self.visit(node.value)  # before the targets, as it runs
        node.targets = [self.visit(target) for target in node.targets]
        if len(node.targets) == 1:
            node.value = self._bound(node.targets[0], node.value, node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        if node.value is not None:
            node.value = self._bound(node.target, self.visit(node.value), node)
        return node

    def _bound(self, target: ast.expr, value: ast.expr, node: ast.stmt) -> ast.expr:
        """The assigned value as an operation; ``a, b = x, y`` are two."""
        if isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List):
            pairs = list(zip(target.elts, value.elts, strict=False))
            if len(target.elts) == len(value.elts) and not any(
                isinstance(e, ast.Starred) for pair in pairs for e in pair
            ):
                value.elts = [self._bound(one, its, node) for one, its in pairs]
            return value
        stem = dotted(target)
        if not _rooted(target) or stem in self._called:
            return value
        return self._through(self._name(stem, node, None), node, [ast.Constant(None), value], [])

    def _name(self, stem: str, node: ast.expr | ast.stmt, callee: ast.expr | None) -> str:
        number = self._counts.get(stem, 0)
        self._counts[stem] = number + 1
        name = f"{stem}_{number}"
        self.lines[name], self.callees[name] = node.lineno, callee
        return name

    def _through(
        self, name: str, node: ast.expr | ast.stmt, args: list[ast.expr], keywords: list[ast.keyword]
    ) -> ast.expr:
        if name not in self._wanted:
            return node if isinstance(node, ast.Call) else args[1]
        call = ast.Call(ast.Name(OPERATION, ast.Load()), [ast.Constant(name), *args], keywords)
        return ast.fix_missing_locations(ast.copy_location(call, node))


def without_source(name: str, why: str) -> InvalidGraph:
    return InvalidGraph(f"{name} has no source that can be read", why=why)
