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

_known: dict[int, tuple[CodeType, dict[int, Source] | None]] = {}
"""By the id of a code object, which is held so that its id stays its own, the lines of its instructions; None: it is ours."""


def users_frame() -> FrameType:
    """The innermost frame that is neither ours nor torch's."""
    return _users(sys._getframe(1))[0]  # noqa: SLF001 - the documented way to a caller's frame


def users_line(depth: int = 1) -> Source:
    """The line that the researcher's code is at, its file relative to the working folder where it lies below it.

    Parameters
    ----------
    depth
        How many frames up the first one is that may be the researcher's; 1 is the caller.
    """
    frame = sys._getframe(depth)  # noqa: SLF001
    try:
        return _known[id(frame.f_code)][1][frame.f_lasti]  # type: ignore[index]  # of ours none are known
    except (KeyError, TypeError):
        frame, lines = _users(frame)
    if frame.f_lasti not in lines:
        lines[frame.f_lasti] = _source(frame)
    return lines[frame.f_lasti]


def _users(frame: FrameType) -> tuple[FrameType, dict[int, Source]]:
    """The researcher's innermost frame from `frame` on, and the lines that are known of its code."""
    while True:
        known = _known.get(id(frame.f_code)) or _learn(frame)
        if known[1] is not None:
            return frame, known[1]
        if frame.f_back is None:
            return frame, {}
        frame = frame.f_back


def _learn(frame: FrameType) -> tuple[CodeType, dict[int, Source] | None]:
    name = frame.f_globals.get("__name__", "")
    ours = any(name == our or name.startswith(our + ".") for our in _OURS)
    if len(_known) >= _MOST:
        _known.clear()
    known = _known[id(frame.f_code)] = frame.f_code, None if ours else {}
    return known


def _source(frame: FrameType) -> Source:
    file = frame.f_code.co_filename
    here = f"{os.getcwd()}{os.sep}"  # noqa: PTH109 - a Path takes ten times as long
    text = linecache.getline(file, frame.f_lineno, frame.f_globals).strip()
    return Source(file.removeprefix(here), frame.f_lineno, text[:200])
