"""Statements and expressions written as text with places to fill in, at a line of the researcher's."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

RUNTIME = "__rt__"
"""The name of the runtime object in rewritten code; names of this form are never mangled in a class."""

_OURS = re.compile(r"__(rt|[bg]\d+)__")
_LOCATION = ("lineno", "col_offset", "end_lineno", "end_col_offset")


def statements(text: str, at: ast.AST, **parts: ast.expr | list[ast.stmt]) -> list[ast.stmt]:
    """The statements of `text`, a name in it that is a key of `parts` replaced; all else is said to stand at `at`."""
    filling = _Filling(at, parts)
    return [new for statement in ast.parse(text).body for new in filling.several(statement)]


def expression(text: str, at: ast.AST, **parts: ast.expr) -> ast.expr:
    """The expression of `text`, filled in like `statements`."""
    [statement] = ast.parse(text).body
    assert isinstance(statement, ast.Expr)
    return cast("ast.expr", _Filling(at, parts).visit(statement.value))


def constant(value: Any, at: ast.AST) -> ast.expr:
    return ast.copy_location(ast.Constant(value), at)


def is_ours(name: str) -> bool:
    """Whether it is a name that only rewritten code has."""
    return _OURS.fullmatch(name) is not None


class _Filling(ast.NodeTransformer):
    def __init__(self, at: ast.AST, parts: Mapping[str, ast.expr | list[ast.stmt]]) -> None:
        self._at, self._parts = at, parts

    def several(self, statement: ast.stmt) -> list[ast.stmt]:
        found = self.visit(statement)
        return found if isinstance(found, list) else [found]

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Name) and node.value.id in self._parts:
            return self._parts[node.value.id]
        if isinstance(node, ast.Name) and node.id in self._parts:
            return self._parts[node.id]
        for name in _LOCATION:
            if name in node._attributes:  # noqa: SLF001 - documented as `_attributes`
                setattr(node, name, getattr(self._at, name))
        return self.generic_visit(node)
