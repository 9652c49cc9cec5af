"""Ends a worker whose model's thread hangs: a dead file server, a stuck GPU, a deadlock. The pool then starts another one.

A thread of its own looks now and then where the model's thread stands in the program: the calls that it is in. That costs the
model's thread nothing, and a forward goes from one module to the next. Where a request does the same thing again and again,
each node of its graph counts. When nothing has moved for `LIMIT`, the thread is taken to hang. (Between several ranks
`parallel.Watchdog` sees earlier that one of them falls silent.)

While a model is loaded, bytes that were read and time on a core count, too: one call may fetch a whole model. While a
request runs they do not, since a thread that waits for a stuck GPU uses a whole core.

A process that was itself stopped for a while (``scontrol suspend``) counts anew when it wakes.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from nnsight_hpc.wire.errors import ReplicaFailed

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from nnsight_hpc.slurm.worker.control import Control
    from nnsight_hpc.wire.errors import HpcError

LIMIT = 600.0
"""Seconds: longer than any operation of a request should take, shorter than people wait."""
_LOOKS = 20
"""In each `limit`."""
_WORKS = 0.05
"""Of a core; the other threads of a worker use far less."""
_SHOWN = 3
"""Calls of the stack that the reason shows; the log has all."""
logger = logging.getLogger(__name__)


class HangWatch:
    """Watches the thread that creates it, while there is something to do.

    Parameters
    ----------
    end
        Takes the reason, on the watch's own thread, and ends the process.
    limit
        Seconds without a move after which the thread hangs.
    """

    def __init__(self, control: Control, end: Callable[[HpcError], None], limit: float = LIMIT) -> None:
        self._control, self._end, self._limit = control, end, limit
        self._watched = threading.get_ident()
        threading.Thread(target=self._watch, name="hang watch", daemon=True).start()

    def _watch(self) -> None:
        looked = moved = time.monotonic()
        seen, used = self._place(), time.process_time()
        while True:
            time.sleep(self._limit / _LOOKS)
            before, looked = looked, time.monotonic()
            was, seen = seen, self._place()
            spent, used = time.process_time() - used, time.process_time()
            works = self._control.is_loading and spent > _WORKS * (looked - before)
            if seen != was or works or self._control.idle or looked - before > self._limit / 2:
                moved = looked
            elif looked - moved > self._limit:
                self._end(self._reason())
                return

    def _place(self) -> Any:
        """Where the watched thread stands, by all calls that it is in, and how far it has come."""
        calls, frame = [], self._frame()
        while frame is not None:
            calls.append((id(frame), frame.f_lasti))
            frame = frame.f_back
        return calls, self._control.steps

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._watched)  # noqa: SLF001 - its documented name

    def _reason(self) -> HpcError:
        stack = traceback.extract_stack(self._frame())
        logger.error("the model's thread hangs:\n%s", "".join(stack.format()))
        innermost = [f"{call.filename}:{call.lineno} in {call.name}" for call in stack[-_SHOWN:]]
        doing = self._control.report()
        return ReplicaFailed(
            f"the worker hung: its model's thread has not moved for {self._limit:g} s",
            where=f"{'request ' + doing.running[0] if doing.running else doing.state.lower()}, {innermost[-1]}",
            why="a file server or a GPU that does not answer, a deadlock, or one operation that takes longer; it was called "
            "from\n" + "\n".join(innermost),
            next="the pool starts another replica; the whole stack is in the replica's log",
        )
