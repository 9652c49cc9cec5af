"""Rewriting the statements of a block, so that a value may decide: ``if``, ``for``, ``with tracer.iter[…]``.

What is emitted asks at run time whether a value is meant (`block_runtime`). If not, it does what Python does. Lines stay
where they are.

A branch on ``test`` that assigns ``x`` becomes::

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
from typing import TYPE_CHECKING

from nnsight_hpc.tracing import block_names as names
from nnsight_hpc.tracing.block_expressions import Expressions, is_display, surely_plain, surely_plain_items
from nnsight_hpc.tracing.block_templates import RUNTIME, constant, statements

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

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
        if names.jumps([node]) or names.raises([node]) or surely_plain(node.test):
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

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.stmt | list[ast.stmt]:  # noqa: N802 - ast's name
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            return node
        lines: list[ast.stmt] = [node]
        if isinstance(node.op, ast.Add):
            lines = _lines("X = RT.added(OLD, NEW)", node, X=node.target, OLD=_loaded(node.target), NEW=node.value)
        check = _lines("RT.added_to(X)", node, X=_loaded(node.target)) if self.depth else []
        return [*check, *lines]

    def visit_While(self, node: ast.While) -> ast.stmt:  # noqa: N802 - ast's name
        node.body = _without_continue(node.body)
        self.generic_visit(node)
        return node

    def visit_For(self, node: ast.For) -> ast.stmt | list[ast.stmt]:  # noqa: N802 - ast's name
        node.body = _without_continue(node.body)
        if surely_plain_items(node.iter):
            self.generic_visit(node)
            return node
        self.needed = True
        targets, inner = names.assigned([node.target]), names.assigned(node.body)
        variables = [name for name in inner if name not in targets]
        needed_first = tuple(name for name in variables if names.read_before_assigned(node.body, name))
        containers = names.changed_containers(node.body)
        loop, at = self.temporary(), node.iter
        items, body, orelse = self.iterable(node.iter), self.inside(node.body), self.several(node.orelse)
        start = _rebound(loop, "carried", variables, at)
        [run] = _lines(f"for TARGET in {loop}.items: BODY", at, TARGET=node.target, BODY=[*start, *body])
        assert isinstance(run, ast.For)
        run.orelse = orelse
        arguments = f"{tuple(targets)!r}, {tuple(variables)!r}, {needed_first!r}, {bool(orelse)}"
        [around] = _lines(f"with RT.loop(ITEMS, {arguments}) as {loop}: BODY", at, ITEMS=items, BODY=[])
        assert isinstance(around, ast.With)
        around.body = [*_rebound(loop, "container", containers, at), run]
        return [around, *_rebound(loop, "after", sorted({*targets, *inner}), at)]

    def visit_With(self, node: ast.With) -> ast.stmt | list[ast.stmt]:  # noqa: N802 - ast's name
        steps = any(_may_be_steps(item.context_expr) for item in node.items)
        if not steps or names.jumps(node.body):
            self.generic_visit(node)
            return node
        first, *rest = node.items
        if rest:
            node.items, node.body = [first], [ast.copy_location(ast.With(items=rest, body=node.body), node)]
        if not _may_be_steps(first.context_expr):
            self.generic_visit(node)
            return node
        self.needed = True
        step, at = self.temporary(), first.context_expr
        manager = self.expression(first.context_expr)
        first.context_expr = ast.copy_location(ast.Name(step, ast.Load()), at)
        node.body = self.several(node.body)
        return _lines(f"for {step} in RT.passes(MANAGER): BODY", at, MANAGER=manager, BODY=[node])

    def visit_Try(self, node: ast.Try | ast.TryStar) -> list[ast.stmt]:  # noqa: N802 - ast's name
        self.generic_visit(node)
        place = self.temporary()
        for handler in node.handlers:
            handler.body = [*_lines(f"RT.back_to({place})", handler.body[0]), *handler.body]
        if node.finalbody:
            node.finalbody = [*_lines(f"RT.back_to({place})", node.finalbody[0]), *node.finalbody]
        return [*_lines(f"{place} = RT.place()", _head(node)), node]

    visit_TryStar = visit_Try  # noqa: N815


def _without_continue(body: list[ast.stmt]) -> list[ast.stmt]:
    """The body of a loop with what follows ``if …: continue`` in an ``else``, where each way through the branch continues."""
    for index, statement in enumerate(body):
        before, rest = body[:index], body[index + 1 :]
        if isinstance(statement, ast.Continue):
            return before or [ast.copy_location(ast.Pass(), statement)]
        if not isinstance(statement, ast.If) or not names.jumps([statement], (ast.Continue,)):
            continue
        if names.ends_in_continue(statement.body):
            statement.orelse = [*statement.orelse, *rest]
        elif names.ends_in_continue(statement.orelse):
            statement.body = [*statement.body, *rest]
        elif rest:
            continue
        statement.body = _without_continue(statement.body)
        statement.orelse = _without_continue(statement.orelse)
        return [*before, statement]
    return body


def _loaded(name: ast.Name) -> ast.expr:
    return ast.copy_location(ast.Name(name.id, ast.Load()), name)


def _rebound(owner: str, method: str, bound: Iterable[str], at: ast.AST) -> list[ast.stmt]:
    """Give names what the runtime says they are now, when it records."""
    lines = [f" {x} = {owner}.{method}({x!r})\n if {x} is RT.unbound: del {x}" for x in bound]
    return _lines("\n".join([f"if {owner}.recorded:", *lines]), at) if lines else []


def _lines(text: str, at: ast.AST, **parts: ast.expr | list[ast.stmt]) -> list[ast.stmt]:
    return statements(text.replace("RT.", f"{RUNTIME}."), _head(at), **parts)


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
