"""Rewriting the statements of a block, so that a value may decide: ``if``, ``for``, ``with tracer.iter[…]``.

What is emitted asks at run time whether a value is meant (`block_runtime`). If not, it does what Python does. Lines stay
where they are.

Jumps of loops are taken out first (`block_jumps`). A branch on ``test`` that assigns ``x`` becomes::

    b = rt.branch(test, ("x",))
    if b.first:                      # a value: always
        with b: …                    # a value: recorded in its conditional
    if b.recorded: x = b.before("x")
    if b.second:
        with b: …
    if b.recorded: x = b.after("x")
"""

from __future__ import annotations

import ast
import copy
from typing import TYPE_CHECKING, Any, cast

from nnsight_hpc.tracing import block_names as names
from nnsight_hpc.tracing.block_expressions import Expressions, is_display, surely_plain, surely_plain_items
from nnsight_hpc.tracing.block_jumps import Jumps
from nnsight_hpc.tracing.block_templates import RUNTIME, constant, expression, statements

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Collection, Iterable

_NAMED = (ast.Name, ast.Attribute, ast.Subscript)
_COMPOUND = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.TryStar, ast.Match)


def rewritten(body: list[ast.stmt], shared: Collection[str] = ()) -> list[ast.stmt] | None:
    """The statements as they are to be run, or None when nothing in them can hang on a value.

    Parameters
    ----------
    shared
        Names that functions from outside of the block read: each assignment to them is handed on at once.
    """
    body = copy.deepcopy(body)
    rewriter = _Rewriter()
    rewriter.reads = names.reads(body)
    rewriter.containers = {
        target.id
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Assign) and is_display(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    new = rewriter.several(body)
    if not rewriter.needed:
        return None
    gathers = [s for name in rewriter.gathers for s in _lines(f"{name} = RT.gather()", body[0])]
    return _shared([*gathers, *new], frozenset(shared)) if shared else [*gathers, *new]


class _Rewriter(Expressions):
    """Rewrites statements; `reads` says how often each name is read in the whole block."""

    reads: Counter[str]

    def several(self, body: Iterable[ast.stmt]) -> list[ast.stmt]:
        result: list[ast.stmt] = []
        for statement in body:
            new = self.visit(statement)
            result += new if isinstance(new, list) else [new]
        return result

    def inside(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """The statements of a branch or loop, in which a value may decide."""
        self.depth += 1
        try:
            return self.several(body)
        finally:
            self.depth -= 1

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:  # noqa: N802 - ast's name
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.stmt:  # noqa: N802 - ast's name
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.stmt:  # noqa: N802 - ast's name
        return node

    def visit_Global(self, node: ast.Global) -> ast.stmt:  # noqa: N802 - ast's name
        return ast.copy_location(ast.Pass(), node)  # the whole block says it

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:  # noqa: N802 - ast's name
        if surely_plain(node.test):
            self.generic_visit(node)
            return node
        if names.raises([node]):
            node.test = self.emit("RT.of_python(X, 'an `if` with a `raise` in it')", node.test, X=node.test)
            self.generic_visit(node)
            return node
        self.needed = True
        bound, containers = names.assigned(sides := [*node.body, *node.orelse]), names.changed_containers(sides)
        branch, at = self.temporary(), node.test
        test = self.expression(node.test)
        first, second = self.inside(node.body), self.inside(node.orelse)
        lines = _lines(f"{branch} = RT.branch(TEST, {tuple(bound)!r})", at, TEST=test)
        lines += _rebound(branch, "container", containers, at)
        lines += _lines(f"if {branch}.first:\n with {branch}: BODY", at, BODY=first)
        if second:
            lines += _rebound(branch, "before", bound, at)
            lines += _lines(f"if {branch}.second:\n with {branch}: BODY", at, BODY=second)
        return lines + _rebound(branch, "after", bound, at)

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | list[ast.stmt]:  # noqa: N802 - ast's name
        """``test and f(x)`` as a statement is an ``if``, in whose branch lists can be filled."""
        test = _as_if(node)
        return cast("ast.stmt | list[ast.stmt]", self.generic_visit(node) if test is None else self.visit(test))

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt | list[ast.stmt]:  # noqa: N802 - ast's name
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            return node
        lines: list[ast.stmt] = [node]
        if isinstance(node.op, ast.Add):
            lines = _lines("X = RT.added(OLD, NEW)", node, X=node.target, OLD=_loaded(node.target), NEW=node.value)
        check = _lines("RT.added_to(X)", node, X=_loaded(node.target)) if self.depth else []
        return [*check, *lines]

    def visit_Assert(self, node: ast.Assert) -> ast.stmt | list[ast.stmt]:  # noqa: N802 - ast's name
        if surely_plain(node.test):
            self.generic_visit(node)
            return node
        self.needed = True
        test, at = self.temporary(), node.test
        message = self.message(copy.deepcopy(node.msg)) if node.msg else constant(None, at)
        node.test = ast.copy_location(ast.Name(test, ast.Load()), at)
        text = f"if __debug__:\n {test} = TEST\n if RT.decides({test}): RT.check({test}, MESSAGE)\n else: PLAIN"
        return _lines(text, node, TEST=self.expression(at), MESSAGE=message, PLAIN=[node])

    def visit_Match(self, node: ast.Match) -> ast.stmt:  # noqa: N802 - ast's name
        node.subject = self.emit("RT.of_python(X, 'a `match`')", node.subject, X=node.subject)
        self.generic_visit(node)
        return node

    def visit_While(self, node: ast.While) -> ast.stmt | list[ast.stmt]:  # noqa: N802 - ast's name
        jumps = Jumps(self.temporary(), self.temporary())
        body = jumps.freed(node.body)
        if surely_plain(node.test) and not jumps.breaks:
            node.body = body
            self.generic_visit(node)
            return node
        self.needed = True
        going, at = self.temporary(), node.test
        test = _expression(f"not {jumps.broken} and TEST", at, TEST=at) if jumps.breaks else at
        count = ast.copy_location(ast.Name(self.temporary(), ast.Store()), at)
        again = _lines(f"{going} = TEST\nif {going}: BODY", at, TEST=copy.deepcopy(test), BODY=copy.deepcopy(body))
        items, last = _expression(f"RT.many({going})", at), _expression(f"RT.not_({going})", at)
        recorded = self._loop(self.temporary(), count, items, again, self._names(count, again), last=last)
        recorded += _lines(f"RT.ended({going})\nbreak", at)
        text = f"while True:\n {going} = TEST\n if RT.decides({going}): LOOP\n if not {going}: break\n BODY"
        lines = _lines(text, node, TEST=self.expression(test), LOOP=recorded, BODY=self.several(body))
        return [*jumps.start(node), *lines, *self._otherwise(node, jumps)]

    def visit_For(self, node: ast.For) -> ast.stmt | list[ast.stmt]:  # noqa: N802 - ast's name
        jumps = Jumps(self.temporary(), self.temporary())
        body = jumps.freed(node.body)
        if surely_plain_items(node.iter) and not jumps.breaks:
            node.body = body
            self.generic_visit(node)
            return node
        self.needed = True
        loop, target, shared = self.temporary(), node.target, isinstance(node.iter, _NAMED)
        known, last = self._names(target, body), None
        if jumps.breaks:
            target, body, known = self._guarded(loop, target, body, jumps)
            last = _expression(jumps.broken, target)
        lines = self._loop(loop, target, self.iterable(node.iter), body, known, last=last, shared=shared)
        return [*jumps.start(node), *lines, *self._otherwise(node, jumps)]

    def _otherwise(self, node: ast.For | ast.While, jumps: Jumps) -> list[ast.stmt]:
        """The ``else`` of a loop, which is run unless the loop was left."""
        if node.orelse and jumps.breaks:
            return self.several(_lines(f"if not {jumps.broken}: BODY", node.orelse[0], BODY=node.orelse))
        return self.several(node.orelse)

    def _guarded(self, loop: str, target: ast.expr, body: list[ast.stmt], jumps: Jumps) -> tuple[Any, ...]:
        """The target, body and names of a loop that is left by ``break``: after that no pass does anything."""
        at, entry = target, self.temporary()
        body = [*_lines("TARGET = X", at, TARGET=target, X=_expression(entry, at)), *body]
        bound, inner, first, used, unsure = self._names(target, body)
        guarded = _lines(f"if {loop}.going({jumps.broken}): BODY", at, BODY=body)
        inner, first = (*inner, *bound, jumps.broken), (*first, jumps.broken)
        return ast.copy_location(ast.Name(entry, ast.Store()), at), guarded, ((), inner, first, used, unsure)

    def _names(self, target: ast.expr, body: list[ast.stmt]) -> tuple[tuple[str, ...], ...]:
        """What `LoopNames` tells of a loop."""
        bound, inside = names.assigned([target]), names.reads(body)
        inner = tuple(name for name in names.assigned(body) if name not in bound)
        first = tuple(name for name in inner if names.read_before_assigned(body, name))
        used = tuple(name for name in inner if name in first or self.reads[name] > inside[name])
        unsure = tuple(name for name in inner if not names.surely_assigned(body, name))
        return tuple(bound), inner, first, used, unsure

    def _loop(
        self,
        loop: str,
        target: ast.expr,
        items: ast.expr,
        body: list[ast.stmt],
        known: tuple[tuple[str, ...], ...],
        *,
        last: ast.expr | None = None,
        shared: bool = False,
    ) -> list[ast.stmt]:
        """A loop over `items`, rewritten already; `last` says at the end of a pass whether it is the last."""
        at, (bound, inner, *_) = items, known
        containers = names.changed_containers(body)
        start, new = _rebound(loop, "carried", inner, at), self.inside(body)
        end = _lines(f"if {loop}.leave(LAST): break", at, LAST=last) if last is not None else []
        run = _lines(f"for TARGET in {loop}.items: BODY", at, TARGET=target, BODY=[*start, *new, *end])
        whole = [*_rebound(loop, "container", containers, at), *run]
        around = _lines(f"with RT.loop(ITEMS, {known!r}, {shared}) as {loop}: BODY", at, ITEMS=items, BODY=whole)
        return [*around, *_rebound(loop, "after", sorted({*bound, *inner}), at)]

    def visit_With(self, node: ast.With) -> ast.stmt | list[ast.stmt]:  # noqa: N802 - ast's name
        first, *rest = node.items
        if not any(_may_be_steps(item.context_expr) or _may_be_branch(item.context_expr) for item in node.items):
            self.generic_visit(node)
            return node
        if rest:
            node.items, node.body = [first], [ast.copy_location(ast.With(items=rest, body=node.body), node)]
        if _may_be_branch(first.context_expr):
            return self._conditional(node)
        if not _may_be_steps(first.context_expr):
            self.generic_visit(node)
            return node
        self.needed = True
        step, at = self.temporary(), first.context_expr
        items = self.emit("RT.passes(MANAGER)", at, MANAGER=self.expression(at))
        first.context_expr = ast.copy_location(ast.Name(step, ast.Load()), at)
        target = ast.copy_location(ast.Name(step, ast.Store()), at)
        return self._loop(self.temporary(), target, items, [node], self._names(target, [node]))

    def _conditional(self, node: ast.With) -> list[ast.stmt]:
        """``with tracer.cond(value) as c:``, ``with c.else_():``."""
        self.needed = True
        [item] = node.items
        bound, containers = names.assigned(node.body), names.changed_containers(node.body)
        branch, at = self.temporary(), item.context_expr
        lines = _lines(f"{branch} = RT.conditional(X, {tuple(bound)!r})", at, X=self.expression(at))
        lines += [*_rebound(branch, "container", containers, at), *_rebound(branch, "before", bound, at)]
        item.context_expr = ast.copy_location(ast.Name(branch, ast.Load()), at)
        node.body = self.inside(node.body)
        return [*lines, node, *_rebound(branch, "after", bound, at)]

    def visit_Try(self, node: ast.Try | ast.TryStar) -> list[ast.stmt]:  # noqa: N802 - ast's name
        self.generic_visit(node)
        place = self.temporary()
        for handler in node.handlers:
            handler.body = [*_lines(f"RT.back_to({place})", handler.body[0]), *handler.body]
        if node.finalbody:
            node.finalbody = [*_lines(f"RT.back_to({place})", node.finalbody[0]), *node.finalbody]
        return [*_lines(f"{place} = RT.place()", _head(node)), node]

    visit_TryStar = visit_Try  # noqa: N815


def _as_if(node: ast.Expr) -> ast.If | None:
    """A statement ``a and b``, ``a or b`` or ``b if a else c`` as an ``if``."""
    value = node.value
    if isinstance(value, ast.IfExp):
        made = ast.If(value.test, [_statement(value.body)], [_statement(value.orelse)])
    elif isinstance(value, ast.BoolOp):
        *tests, last = value.values
        test = tests[0] if len(tests) == 1 else ast.copy_location(ast.BoolOp(value.op, tests), value)
        if isinstance(value.op, ast.Or):
            test = ast.copy_location(ast.UnaryOp(ast.Not(), test), test)
        made = ast.If(test, [_statement(last)], [])
    else:
        return None
    return ast.copy_location(made, node)


def _statement(node: ast.expr) -> ast.stmt:
    return ast.copy_location(ast.Expr(node), node)


def _loaded(name: ast.Name) -> ast.expr:
    return ast.copy_location(ast.Name(name.id, ast.Load()), name)


def _rebound(owner: str, method: str, bound: Iterable[str], at: ast.AST) -> list[ast.stmt]:
    """Give names what the runtime says they are now, when it records."""
    lines = [f" {x} = {owner}.{method}({x!r})\n if {x} is RT.unbound: del {x}" for x in bound]
    return _lines("\n".join([f"if {owner}.recorded:", *lines]), at) if lines else []


def _lines(text: str, at: ast.AST, **parts: ast.expr | list[ast.stmt]) -> list[ast.stmt]:
    return statements(text.replace("RT.", f"{RUNTIME}."), _head(at), **parts)


def _expression(text: str, at: ast.AST, **parts: ast.expr) -> ast.expr:
    return expression(text.replace("RT.", f"{RUNTIME}."), at, **parts)


def _head(node: ast.AST) -> ast.AST:
    """A place at the first line of a statement that may have many."""
    if not isinstance(node, ast.stmt) or node.end_lineno == node.lineno:
        return node
    here = constant(None, node)
    here.end_lineno, here.end_col_offset = here.lineno, here.col_offset
    return here


def _may_be_steps(node: ast.expr) -> bool:
    """``tracer.iter[…]``, ``tracer.all()``."""
    inner = node.value if isinstance(node, ast.Subscript) else node.func if isinstance(node, ast.Call) else None
    return isinstance(inner, ast.Attribute) and inner.attr in ("iter", "all")


def _may_be_branch(node: ast.expr) -> bool:
    """``tracer.cond(…)``, ``c.else_()``."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("cond", "else_")


def _shared(body: list[ast.stmt], shared: frozenset[str]) -> list[ast.stmt]:
    """The statements, each assignment of a shared name followed by telling the frame that it belongs to."""
    result: list[ast.stmt] = []
    for statement in body:
        result.append(statement)
        if not isinstance(statement, _COMPOUND):
            result += _told(names.assigned([statement]), shared, statement)
            continue
        bound = names.assigned([statement.target] if isinstance(statement, ast.For) else [])
        bound += names.assigned(i for i in statement.items) if isinstance(statement, ast.With) else []
        _share_inside(statement, shared)
        if isinstance(statement, ast.For | ast.With):
            statement.body = [*_told(bound, shared, statement.body[0]), *statement.body]
    return result


def _share_inside(statement: ast.AST, shared: frozenset[str]) -> None:
    for field in ("body", "orelse", "finalbody"):
        if inner := getattr(statement, field, None):
            setattr(statement, field, _shared(inner, shared))
    for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
        _share_inside(part, shared)


def _told(bound: Iterable[str], shared: frozenset[str], at: ast.AST) -> list[ast.stmt]:
    return [line for name in bound if name in shared for line in _lines(f"RT.share({name!r}, {name})", at)]
