"""What statements do to names, and whether they are left other than at their end. Inner functions are not looked into."""

from __future__ import annotations

import ast
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
CHANGES = frozenset({"append", "extend", "insert", "pop", "popitem", "clear", "remove", "sort", "reverse", "update"})
CHANGES |= {"setdefault", "add", "discard"}
_ALWAYS_BIND = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_WAITS: dict[type[ast.AST], str] = {
    ast.Yield: "yield",
    ast.YieldFrom: "yield from",
    ast.Await: "await",
    ast.AsyncFor: "async for",
    ast.AsyncWith: "async with",
    ast.Return: "return",
    ast.Nonlocal: "nonlocal",
}


def assigned(statements: Iterable[ast.AST]) -> list[str]:
    """The names that the statements bind, in a fixed order."""
    return sorted({name for statement in statements for node in _of_scope(statement) for name in _bound_by(node)})


def read(statements: Iterable[ast.AST]) -> set[str]:
    """The names that the statements, and functions in them, may read."""
    return {*reads(statements)}


def targets(statements: Iterable[ast.AST]) -> set[str]:
    """The names that loops in the statements give their items."""
    loops = [node for statement in statements for node in _of_scope(statement) if isinstance(node, ast.For)]
    return {*assigned(loop.target for loop in loops)}


def reads(statements: Iterable[ast.AST]) -> Counter[str]:
    """How often the statements read each name, functions in them included."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    loads = [n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)]
    return Counter(
        [*loads, *(n.target.id for n in nodes if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name))]
    )


def read_before_assigned(statements: Sequence[ast.stmt], name: str) -> bool:
    """Whether the statements may read what `name` is before they run."""
    for statement in statements:
        if name in read([statement]):
            return True
        if isinstance(statement, ast.Assign | ast.AnnAssign) and name in assigned([statement]):
            return False
    return False


def surely_assigned(statements: Sequence[ast.stmt], name: str) -> bool:
    """Whether each way through the statements binds `name`."""
    for statement in statements:
        if isinstance(statement, ast.If) and statement.orelse:
            if surely_assigned(statement.body, name) and surely_assigned(statement.orelse, name):
                return True
        elif isinstance(statement, ast.With):
            if surely_assigned(statement.body, name):
                return True
        elif isinstance(statement, _ALWAYS_BIND) and name in assigned([statement]):
            return True
    return False


def changed_containers(statements: Iterable[ast.AST]) -> list[str]:
    """The names whose entries the statements append, assign or take away: ``x.append(…)``, ``x[i] = …``, ``x += …``."""
    nodes = [node for statement in statements for node in _of_scope(statement)]
    methods = [
        n.func.value
        for n in nodes
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in CHANGES
    ]
    places = [n.value for n in nodes if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store)]
    added = [n.target for n in nodes if isinstance(n, ast.AugAssign)]
    return sorted({owner.id for owner in (*methods, *places, *added) if isinstance(owner, ast.Name)})


def leaves(statements: Iterable[ast.AST]) -> str:
    """The word with which the statements return, yield, wait, delete names, or jump in a loop that is around them."""
    for statement in statements:
        for kind in (ast.Break, ast.Continue):
            if jumps([statement], (kind,)):
                return kind.__name__.lower()
        for node in _of_scope(statement):
            if isinstance(node, ast.comprehension) and node.is_async:
                return "async for"
            if isinstance(node, ast.Delete) and any(isinstance(target, ast.Name) for target in node.targets):
                return "del"
            if word := _WAITS.get(type(node)):
                return word
    return ""


def jumps(statements: Iterable[ast.AST], kinds: tuple[type[ast.stmt], ...] = (ast.Break, ast.Continue)) -> bool:
    """Whether the statements hold a ``break`` or ``continue`` of the loop that is around them."""
    for statement in statements:
        if isinstance(statement, kinds):
            return True
        if isinstance(statement, _SCOPES):
            continue
        inner = statement.orelse if isinstance(statement, _LOOPS) else _inner_statements(statement)
        if jumps(inner, kinds):
            return True
    return False


def raises(statements: Iterable[ast.AST]) -> bool:
    """Whether the statements raise an exception: that cannot be recorded for where the graph runs."""
    return any(isinstance(node, ast.Raise) for statement in statements for node in _of_scope(statement))


def _inner_statements(statement: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield child


def _of_scope(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and what is in it, as far as its names are those of the same function."""
    yield node
    if isinstance(node, _SCOPES):
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.comprehension) and child is node.target:
            continue
        yield from _of_scope(child)


def _bound_by(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        yield node.name
    elif isinstance(node, ast.MatchMapping) and node.rest:
        yield node.rest
