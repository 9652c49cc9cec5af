"""The source of a running ``with`` statement: found by the position of the instruction that a frame is at."""

from __future__ import annotations

import ast
import functools
import linecache
from dataclasses import dataclass
from itertools import islice
from types import CodeType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    Position = tuple[int | None, int | None, int | None, int | None]
    Function = ast.FunctionDef | ast.AsyncFunctionDef

_BYTES = 2  # of one instruction


@dataclass(frozen=True)
class Block:
    """What a context manager's ``with`` statement does once the manager is entered.

    Attributes
    ----------
    body
        The statements; for ``with a, b: …`` the rest of `a` is a statement ``with b: …``.
    around
        The statements that it stands in, the module's first.
    start
        The offset of the body's first instruction.
    """

    body: list[ast.stmt]
    around: tuple[ast.AST, ...]
    start: int

    @property
    def lines(self) -> range:
        return range(self.body[0].lineno, (self.body[-1].end_lineno or self.body[-1].lineno) + 1)


def find(frame: FrameType) -> Block | None:
    """The block of the context manager whose ``__enter__`` the frame is calling, or None where the source cannot tell."""
    code, at = frame.f_code, frame.f_lasti
    positions = list(code.co_positions())
    position = positions[at // _BYTES]
    if None in position:  # python -X no_debug_ranges
        return None
    found = _statement(_source(frame), position)
    if found is None:
        return None
    statement, index, around = found
    if index is None:
        index = _rank(code, at, positions) % len(statement.items)
    body = _rest(statement, index)
    if not _same_names(body, code):
        return None
    first = (body[0].lineno, body[0].col_offset)
    later = range(at + _BYTES, len(positions) * _BYTES, _BYTES)
    start = next((o for o in later if _begin(positions[o // _BYTES]) >= first), None)
    return None if start is None else Block(body, around, start)


def stores(code: CodeType) -> Iterator[tuple[str, int]]:
    """Each name that `code` itself assigns to or deletes, with the line."""
    names = {
        "STORE_FAST",
        "STORE_DEREF",
        "DELETE_FAST",
        "DELETE_DEREF",
        "STORE_FAST_STORE_FAST",
        "STORE_FAST_LOAD_FAST",
    }
    import dis  # noqa: PLC0415 - once a block, and not where nothing is rewritten

    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        line = (instruction.positions.lineno if instruction.positions else None) or line
        if instruction.opname in names:
            stored = instruction.argval
            yield from ((name, line) for name in (stored if isinstance(stored, tuple) else (stored,)))


def inner_codes(code: CodeType) -> Iterator[CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, CodeType))


def _source(frame: FrameType) -> str:
    return "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))


@functools.lru_cache(maxsize=16)
def _tree(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):  # a notebook's magic, a file that was changed
        return None


def _statement(source: str, position: Position) -> tuple[ast.With, int | None, tuple[ast.AST, ...]] | None:
    """The statement at `position`, which item of it that is (None: not said, before Python 3.13), and what is around."""
    tree = _tree(source)
    path: list[ast.AST] = [tree] if tree else []
    while path:
        node = path[-1]
        if isinstance(node, ast.With):
            if _position(node) == position:
                return node, None, tuple(path[:-1])
            for index, item in enumerate(node.items):
                if _position(item.context_expr) == position:
                    return node, index, tuple(path[:-1])
        inner = next(
            (c for c in _statements_in(node) if _begin(_position(c)) <= _begin(position) and _holds(c, position)), None
        )
        if inner is None:
            return None
        path.append(inner)
    return None


def _statements_in(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes right below `node` that may hold statements."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        elif isinstance(child, ast.ExceptHandler | ast.match_case):
            yield from _statements_in(child)


def _holds(node: ast.AST, position: Position) -> bool:
    _, end_line, _, end_column = _position(node)
    return (end_line or 0, end_column or 0) >= (position[1] or 0, position[3] or 0)


def _position(node: ast.AST) -> Position:
    return tuple(getattr(node, name, None) for name in ("lineno", "end_lineno", "col_offset", "end_col_offset"))  # type: ignore[return-value]


def _begin(position: Position) -> tuple[int, int]:
    return position[0] or 0, position[2] or 0


def _rank(code: CodeType, at: int, positions: list[Position]) -> int:
    """How many managers of the same statement the code enters before offset `at`."""
    opcode = code.co_code[at]
    here = positions[at // _BYTES]
    return sum(
        code.co_code[n * _BYTES] == opcode and position == here
        for n, position in islice(enumerate(positions), at // _BYTES)
    )


def _rest(statement: ast.With, index: int) -> list[ast.stmt]:
    rest = statement.items[index + 1 :]
    if not rest:
        return statement.body
    inner = ast.copy_location(ast.With(items=rest, body=statement.body), statement)
    inner.lineno, inner.col_offset = rest[0].context_expr.lineno, rest[0].context_expr.col_offset
    return [inner]


def _same_names(body: list[ast.stmt], code: CodeType) -> bool:
    """Whether the code knows the names of the body: where a file was edited since, it hardly does."""
    known: set[str] = set()
    waiting = [code]
    while waiting:
        one = waiting.pop()
        known.update(one.co_names, one.co_varnames, one.co_freevars, one.co_cellvars)
        waiting += inner_codes(one)
    used = {node.id for part in body for node in ast.walk(part) if isinstance(node, ast.Name)}
    return all(name in known for name in used if not name.startswith("__"))
