"""``break`` and ``continue`` of a loop as names that are assigned and asked for, which a value can decide.

What follows a jump in its list of statements moves to the other branch of the ``if`` that the jump ends; where there is no
such branch, what follows is run only if the name for "jumped in this pass" is not set.
"""

from __future__ import annotations

import ast

from nnsight_hpc.tracing import block_names as names
from nnsight_hpc.tracing.block_templates import statements

_JUMPS = (ast.Break, ast.Continue)
_LOOPS = (ast.For, ast.While)


class Jumps:
    """The jumps of one loop.

    Parameters
    ----------
    broken, jumped
        The names that are true once the loop was left, and once a pass was.

    Attributes
    ----------
    breaks, jumps
        Whether there was anything to set them for.
    """

    def __init__(self, broken: str, jumped: str) -> None:
        self.broken, self.jumped = broken, jumped
        self.breaks = self.jumps = False

    def start(self, at: ast.AST) -> list[ast.stmt]:
        """What stands before the loop."""
        return statements(f"{self.broken} = False", _line(at)) if self.breaks else []

    def freed(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """The body of the loop without jumps."""
        new = self.without(body)
        return [*statements(f"{self.jumped} = False", _line(body[0])), *new] if self.jumps else new

    def without(self, body: list[ast.stmt], *, told: bool = False) -> list[ast.stmt]:
        """The statements without jumps of this loop.

        Parameters
        ----------
        told
            Whether something follows that has to know that the pass was left.
        """
        for index, statement in enumerate(body):
            before, rest = body[:index], body[index + 1 :]
            if isinstance(statement, _JUMPS):
                return [*before, *self._jump(statement, told)]
            if names.jumps([statement]):
                return [*before, *self._with_rest(statement, rest, told)]
        return body

    def _jump(self, statement: ast.stmt, told: bool) -> list[ast.stmt]:
        lines = statements(f"{self.jumped} = True", statement) if told else []
        self.jumps = self.jumps or told
        if isinstance(statement, ast.Break):
            self.breaks = True
            lines += statements(f"{self.broken} = True", statement)
        return lines or [ast.copy_location(ast.Pass(), statement)]

    def _with_rest(self, statement: ast.stmt, rest: list[ast.stmt], told: bool) -> list[ast.stmt]:
        """A statement that holds jumps, with what follows it."""
        if isinstance(statement, ast.If) and (not rest or _ends(statement.body) or _ends(statement.orelse)):
            if _ends(statement.body):
                statement.orelse = [*statement.orelse, *rest]
            else:
                statement.body = [*statement.body, *rest]
            statement.body = self.without(statement.body, told=told)
            statement.orelse = self.without(statement.orelse, told=told)
            return [statement]
        self._inside(statement, told=told or bool(rest))
        if not rest:
            return [statement]
        after = statements(f"if not {self.jumped}: REST", rest[0], REST=self.without(rest, told=told))
        return [statement, *after]

    def _inside(self, statement: ast.AST, *, told: bool) -> None:
        for field in ("orelse",) if isinstance(statement, _LOOPS) else ("body", "orelse", "finalbody"):
            if inner := getattr(statement, field, None):
                setattr(statement, field, self.without(inner, told=told))
        for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            self._inside(part, told=told)


def _line(node: ast.AST) -> ast.AST:
    """A place at the beginning of a statement."""
    place = ast.copy_location(ast.Constant(None), node)
    place.end_lineno, place.end_col_offset = place.lineno, place.col_offset
    return place


def _ends(body: list[ast.stmt]) -> bool:
    """Whether each way through the statements ends at a jump."""
    last = body[-1] if body else None
    if isinstance(last, ast.If):
        return _ends(last.body) and _ends(last.orelse)
    return isinstance(last, _JUMPS)
