"""The lines of the user's program that a graph was recorded from, as far as their text tells."""

from __future__ import annotations

import ast
from functools import cache
from typing import TYPE_CHECKING

from nnsight_hpc.graph.build import (
    APPEND,
    BACKWARD,
    CARRIED,
    CHECK,
    ELSE,
    END,
    FINAL,
    FORWARDS,
    IF,
    INVOKE,
    LEAVE,
    LOG,
    LOOP,
    MERGE,
    NEXT,
    SAVE,
    SET_GRAD,
    SETS,
    SKIP,
)
from nnsight_hpc.graph.operations import IN_PLACE

if TYPE_CHECKING:
    from nnsight_hpc.graph.layout import Place
    from nnsight_hpc.graph.nodes import Graph, Node

STATEMENTS = frozenset({*SETS.values(), SKIP, SAVE, BACKWARD, SET_GRAD, APPEND, LOG, CHECK, LEAVE, NEXT, END})
"""What is done rather than computed."""
OPENERS = FORWARDS | {INVOKE, IF, ELSE, LOOP}


class Statements:
    """Which nodes belong to one line of the program, and what that line assigns its value to."""

    def __init__(self, graph: Graph, places: list[Place]) -> None:
        self._graph = graph
        self._group: dict[int, int] = {}
        self._targets: dict[int, str] = {}
        group, before = 0, None
        counts: dict[int, int] = {}
        for place in places:
            node = graph.nodes[place.node]
            if node.source is None or before is None or node.source != before.source or node.block != before.block:
                group += 1
            self._group[node.id] = group
            before = node
            if node.source is None or (assigned := _assignment(node.source.text)) is None:
                continue
            name, operation, times = assigned
            if node.op.rpartition(".")[2].rstrip("_") == operation:
                counts[group] = counts.get(group, 0) + 1
                if counts[group] % times == 0:
                    self._targets[node.id] = name

    def target(self, node: int) -> str | None:
        """The name that the program gives to the value of `node`."""
        return self._targets.get(node)

    def inlined(self, node: int, users: list[list[int]]) -> bool:
        """Whether the value is written where it is used: once, in the same line of the program."""
        op = self._graph.nodes[node].op
        if op in STATEMENTS or op in OPENERS or op in IN_PLACE or node in self._targets or len(users[node]) != 1:
            return False
        [user] = users[node]
        together = self._group[user] == self._group[node]
        return together and self._graph.nodes[user].op not in (MERGE, NEXT, FINAL, CARRIED, SAVE)

    def save_of(self, node: int, users: list[list[int]]) -> int | None:
        """The save of the value in the same line of the program."""
        saves = (user for user in users[node] if self._graph.nodes[user].op == SAVE)
        source = self._graph.nodes[node].source
        return next((s for s in saves if self._group[s] == self._group[node] or source is None), None)


@cache
def _assignment(line: str) -> tuple[str, str, int] | None:
    """The one name that a line assigns to, the outermost operation of what it assigns, and how often that occurs in it."""
    statement = _parsed(line)
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    [target] = statement.targets
    value = statement.value
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "save":
        value = value.func.value
    outermost = _operation(value)
    if not isinstance(target, ast.Name) or outermost is None:
        return None
    called = {id(part.func) for part in ast.walk(value) if isinstance(part, ast.Call)}
    times = sum(_operation(part) == outermost for part in ast.walk(value) if id(part) not in called)
    return target.id, outermost, times


def _operation(expression: ast.AST) -> str | None:
    """The last part of the name that the outermost operation of an expression has in a graph."""
    match expression:
        case ast.Call(func=ast.Attribute(attr=name)) | ast.Call(func=ast.Name(id=name)):
            return name.rstrip("_")
        case ast.Subscript():
            return "getitem"
        case ast.Attribute(attr=name):
            return name
        case ast.BinOp(op=kind) | ast.UnaryOp(op=kind) | ast.Compare(ops=[kind]):
            return _OPERATIONS.get(type(kind))
        case _:
            return None


_OPERATIONS: dict[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "truediv",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.Pow: "pow",
    ast.MatMult: "matmul",
    ast.BitAnd: "and",
    ast.BitOr: "or",
    ast.BitXor: "xor",
    ast.USub: "neg",
    ast.UAdd: "pos",
    ast.Invert: "invert",
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
}


def loop_target(node: Node) -> str | None:
    statement = _parsed(node.source.text) if node.source else None
    return statement.target.id if isinstance(statement, ast.For) and isinstance(statement.target, ast.Name) else None


def _parsed(line: str) -> ast.stmt | None:
    try:
        found = ast.parse(line + " pass" if line.endswith(":") else line).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return found[0] if found else None
