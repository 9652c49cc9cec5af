"""Which line of the researcher made a node. Asked at every operation, so what is known of a code object is kept."""

from __future__ import annotations

import linecache
import os
import sys
from typing import TYPE_CHECKING

from nnsight_hpc.graph.nodes import Source

if TYPE_CHECKING:
    from types import CodeType, FrameType

_OURS = ("nnsight_hpc.tracing", "torch", "einops", "numpy", "copy", "pickle")
_MOST = 4096
"""So many code objects are remembered; a notebook makes a few for each cell."""


class _Known:
    """What is known of a code object, which is held so that its id stays its own: whose it is, its lines by instruction."""

    __slots__ = ("code", "lines", "ours")

    def __init__(self, frame: FrameType) -> None:
        name = frame.f_globals.get("__name__", "")
        self.code: CodeType = frame.f_code
        self.ours = any(name == our or name.startswith(our + ".") for our in _OURS)
        self.lines: dict[int, Source] = {}


_known: dict[int, _Known] = {}


def users_frame() -> FrameType:
    """The innermost frame that is neither ours nor torch's."""
    return _users()[0]


def users_line() -> Source:
    """The line that the researcher's code is at, its file relative to the working folder where it lies below it."""
    frame, known = _users()
    try:
        return known.lines[frame.f_lasti]
    except KeyError:
        source = known.lines[frame.f_lasti] = _source(frame)
        return source


def _users() -> tuple[FrameType, _Known]:
    frame = sys._getframe(2)  # noqa: SLF001 - the documented way to a caller's frame
    while True:
        known = _known.get(id(frame.f_code)) or _learn(frame)
        if not known.ours or frame.f_back is None:
            return frame, known
        frame = frame.f_back


def _learn(frame: FrameType) -> _Known:
    if len(_known) >= _MOST:
        _known.clear()
    known = _known[id(frame.f_code)] = _Known(frame)
    return known


def _source(frame: FrameType) -> Source:
    file = frame.f_code.co_filename
    here = f"{os.getcwd()}{os.sep}"  # noqa: PTH109 - a Path takes ten times as long
    text = linecache.getline(file, frame.f_lineno, frame.f_globals).strip()
    return Source(file.removeprefix(here), frame.f_lineno, text[:200])
