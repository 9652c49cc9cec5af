"""Python's own objects in code that a value decides: those of before cannot be changed there, those made there can."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from nnsight_hpc.tracing.block_reach import Reach, random_state
from nnsight_hpc.tracing.lines import users_frame, users_line
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nnsight_hpc.tracing.recorder import Recorder

_ADDS = tuple(
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
)
_INSTEAD = "use a local list or name in the block, and assign it after the block; or tracer.list(), tracer.dict()"


@dataclass(frozen=True)
class _Region:
    """A branch, or the one recorded pass of a loop, with the objects that were there before it."""

    recorder: Recorder
    reach: Reach
    states: dict[int, tuple[Any, ...]]
    random: tuple[Any, ...]


class Objects:
    """The branches and loops of a value that are being recorded, the innermost last."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._closed: _Region | None = None

    @property
    def recorder(self) -> Recorder | None:
        """That of the innermost branch or loop, inside of one."""
        return self._regions[-1].recorder if self._regions else None

    def open_again(self) -> None:
        """The other branch begins, right after the first one."""
        assert self._closed is not None, "closed just before"
        self._regions.append(self._closed)

    def open(self, recorder: Recorder, rebound: Iterable[str] = (), *, loop: bool = False) -> None:
        """A branch or pass begins in the researcher's code, which itself binds the names `rebound` there."""
        reach = Reach(users_frame(), {*rebound})
        self._regions.append(_Region(recorder, reach, reach.states(), random_state() if loop else ()))

    def close(self, *, failed: bool = False, filled: bool = False) -> None:
        """It is over; raises `InvalidInput` if it changed an object of before, unless it ended with an error anyway.

        Parameters
        ----------
        filled
            Whether lists may have got saved values: what is absent is taken out of them when results come.
        """
        region = self._closed = self._regions.pop()
        if failed:
            return
        for item, path in region.reach.changed(region.states):
            if not (filled and _has_more_saves(item, region.states[id(item)])):
                _refuse(f"{path!r}, a {type(item).__name__}, is changed where a value decides, by what is called there")
        if region.random and region.random != random_state():
            _refuse(
                "random numbers are drawn where a value decides",
                why="the loop is recorded once, so that each pass would get the same ones",
                instead="draw them before the loop, as many as it has passes, and take one in each",
            )

    def owner(self, item: Any, root: Any = None) -> Any:
        """An object whose attribute or entry is about to be changed; refused if it was there before a value decided."""
        if (
            self._regions
            and not _is_ours(item)
            and (self._is_known(item) or (root is not None and self._is_known(root)))
        ):
            _refuse(f"a {type(item).__name__} is changed where a value decides, and that cannot be recorded")
        return item

    def added_to(self, item: Any) -> None:
        """``item += …`` and the like, which change some objects in place."""
        if self._regions and not _is_ours(item) and any(hasattr(type(item), name) for name in _ADDS):
            self.owner(item)

    def _is_known(self, item: Any) -> bool:
        return not (_is_ours(item) or isinstance(item, ModuleType)) and id(item) in self._regions[-1].reach.paths


def _refuse(
    what: str,
    why: str = "each branch, and one pass of the loop, is recorded before the model runs: it would happen in any case",
    instead: str = _INSTEAD,
) -> NoReturn:
    raise InvalidInput(what, where=str(users_line()), why=why, next=instead)


def _has_more_saves(item: Any, before: tuple[Any, ...]) -> bool:
    """Whether a list has what it had before, and saved values after that."""
    if type(item) is not list:
        return False
    kept = len(before) - 1
    return all(map(operator.is_, item, before[1:])) and all(
        type(e) is Value and e.saved is not None for e in item[kept:]
    )


def _is_ours(item: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "nnsight_hpc" for kind in type(item).__mro__)
