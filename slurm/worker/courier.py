"""The thread that brings requests from the daemon to the model's thread, and takes outcomes back.

It waits for the daemon so that the model's thread need not: outcomes are repeated until they are acknowledged, however
long the daemon is away, and only then are the next requests asked for. Those that may share a forward come together.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from nnsight_hpc.slurm.batch.executor import ENDS_VARIABLE
from nnsight_hpc.slurm.worker.link import DECISIVE, DaemonAddress, Link
from nnsight_hpc.slurm.worker.returns import Ending, Returns
from nnsight_hpc.slurm.worker.said import Said
from nnsight_hpc.wire.errors import Conflict, ErrorReport, HpcError, NotFound, from_report
from nnsight_hpc.wire.messages import encode
from nnsight_hpc.wire.workers import Begun, Lease, Outcome, WorkerHello, WorkerWelcome

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from nnsight_hpc.slurm.worker.control import Control
    from nnsight_hpc.slurm.worker.room import Room
    from nnsight_hpc.slurm.worker.together import Ended

T = TypeVar("T")

_POLL = 20.0
"""Seconds that the daemon may hold a question for work."""
_GATHER, _GATHER_MOST = 0.15, 0.1
"""After requests that shared a forward, the part of their time, and the seconds at most, for others to come that can share
the next: who has just got a result may ask again. Without it half of them miss each forward."""
_DELIVERY, _SPARE = 60.0, 8.0
"""Seconds for which a draining worker still tries to deliver its last outcome, and that the job's time limit leaves it then."""
_BEGUN = 0.005
"""Seconds that a request runs before the daemon is told; what has ended by then is better off without that."""
_SAY_EVERY, _SAY_AGAIN = 0.1, 1.0
"""Seconds between two sendings of what a request says, and after one that failed."""
logger = logging.getLogger(__name__)


class _Wake:
    """Stands in the outbox for: the running request has said something."""


class Courier:
    """Leases requests. `next`, `say` and `done` are for the model's thread, in turns.

    Parameters
    ----------
    room
        How many may share a forward.
    """

    def __init__(
        self, control: Control, address: DaemonAddress, hello: WorkerHello, welcome: WorkerWelcome | None, room: Room
    ) -> None:
        self._control, self._hello, self._welcome, self._room = control, hello, welcome, room
        self._polls, self._calls, self._starts = Link(address), Link(address), Link(address)
        self._inbox: SimpleQueue[list[Lease] | None] = SimpleQueue()
        self._outbox: SimpleQueue[Ended | _Wake] = SimpleQueue()
        self._begun: SimpleQueue[list[Lease]] = SimpleQueue()
        self._said: dict[str, Said] = {}
        self._running: dict[str, Lease] = {}
        self._returns = Returns(self._confirm)
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._run, "courier"), (self._tell_begun, "begun"))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        self._control.on_drain(self._polls.abandon)

    def next(self) -> list[Lease] | None:
        """Wait for requests, which may share forwards; None when the worker is to end."""
        return self._inbox.get()

    @property
    def datasets(self) -> Path:
        """Where dumps write; known as soon as there is a request."""
        assert self._welcome is not None, "nothing is leased before the daemon's welcome"
        return Path(self._welcome.datasets_folder)

    def say(self, request: str, text: str, source: str) -> None:
        """Send on a line that a running request says; it is with the daemon before the request's outcome is."""
        self._said[request].say(text, source)

    def done(self, ended: Ended) -> None:
        """Hand over how requests ended; None: it was given up, and the daemon is to lease it to another worker."""
        self._outbox.put(ended)

    def _run(self) -> None:
        try:
            while not self._control.draining.is_set():
                if leases := self._lease():
                    begun = time.monotonic()
                    self._bring(leases)
                    if len(leases) > 1:
                        self._control.draining.wait(min(_GATHER_MOST, _GATHER * (time.monotonic() - begun)))
        except HpcError as error:
            if isinstance(error, DECISIVE):  # otherwise the wait for a daemon was cut short, to drain
                self._control.fail(error)
        except Exception as error:
            logger.exception("the courier failed")
            self._control.fail(HpcError("the worker met an error that it did not expect", why=repr(error)))
        finally:
            self._inbox.put(None)

    def _lease(self) -> list[Lease]:
        if self._welcome is None:
            self._register()
        asked = time.monotonic()
        room = f"most={self._room.requests}&tokens={self._room.tokens}"
        path = f"/w1/lease?replica={self._hello.replica}&wait={_POLL:g}&{room}"
        try:
            leases = self._polls.call(path, None, list[Lease], timeout=_POLL + 15)
        except NotFound:  # this daemon has never heard of us
            self._register()
            return []
        except DECISIVE:
            raise
        except HpcError:  # abandoned, to drain
            return []
        if not leases and time.monotonic() - asked < 1:  # the daemon gives us nothing, and will soon say why
            self._control.changed.set()
            self._control.draining.wait(1)
        return leases

    def _register(self) -> None:
        self._welcome = self._polls.call("/w1/register", self._hello, WorkerWelcome)

    def _bring(self, leases: list[Lease]) -> None:
        self._said = {lease.id: Said(lease.attempt, lambda: self._outbox.put(_Wake())) for lease in leases}
        self._running = {lease.id: lease for lease in leases}
        self._inbox.put(leases)
        self._begun.put(leases)
        while self._running:
            ended = self._await_ended(self._running.values())
            for lease, _ in ended:
                self._send_all_said(lease)
                del self._running[lease.id]
            if outcomes := [(lease, outcome) for lease, outcome in ended if outcome is not None]:
                self._deliver(outcomes)
            for lease, _ in ended:
                self._control.finished(lease.id)

    def _tell_begun(self) -> None:
        """Say what runs; how it ended waits for no answer to that, and what has ended is not begun any more."""
        while True:
            leases = self._begun.get()
            time.sleep(_BEGUN)
            begun = [Begun(id=lease.id, attempt=lease.attempt) for lease in leases if lease.id in self._running]
            if not begun:
                continue
            with suppress(HpcError):  # a lease that is no longer ours shows at the outcome
                self._starts.once(f"/w1/started?replica={self._hello.replica}", encode(begun), dict[str, Any])

    def _await_ended(self, running: Collection[Lease]) -> Ended:
        """Send what requests say, the first line at once and then a few times a second, until some have ended."""
        allowed, due = float("-inf"), None
        while True:
            try:
                item = self._outbox.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
            except Empty:
                allowed = max(map(self._send_said, running)) + time.monotonic()
                due = allowed if any(self._said[lease.id].part() for lease in running) else None
                continue
            if not isinstance(item, _Wake):
                return item
            due = due or max(time.monotonic(), allowed)

    def _send_said(self, lease: Lease) -> float:
        """Send a part of what there is to send; the seconds until the next."""
        said = self._said[lease.id]
        if part := said.part():
            at, lines = part
            try:
                self._calls.once(self._log_path(lease, at), lines, dict[str, Any])
            except DECISIVE as error:
                self._not_wanted(lease, error)
            except HpcError:
                return _SAY_AGAIN
            else:
                said.has(len(lines))
        return _SAY_EVERY

    def _send_all_said(self, lease: Lease) -> None:
        said = self._said[lease.id]
        while part := said.part():
            at, lines = part
            try:
                self._call(self._log_path(lease, at), lines, dict[str, Any])
            except HpcError as error:
                self._not_wanted(lease, error)
            else:
                said.has(len(lines))

    def _not_wanted(self, lease: Lease, error: HpcError) -> None:
        logger.warning("what %s says is not kept any more\n%s", lease.id, error, extra={"request": lease.id})
        self._said[lease.id].close()

    def _log_path(self, lease: Lease, at: int) -> str:
        return f"/w1/log?replica={self._hello.replica}&id={lease.id}&attempt={lease.attempt}&at={at}"

    def _deliver(self, ended: Sequence[tuple[Lease, Outcome]]) -> None:
        """Tell how these ended, and keep their results until the daemon has them on its disk."""
        endings = self._returns.place(ended)
        if told := [ending for ending in endings if ending.refused is None]:
            self._tell(told)
        for ending in endings:
            if ending.refused is not None:
                _note_refused(ending, ending.refused)

    def _tell(self, endings: Sequence[Ending]) -> None:
        outcomes = encode([ending.outcome for ending in endings])
        try:
            reports = self._call(f"/w1/outcomes?replica={self._hello.replica}", outcomes, list[ErrorReport | None])
        except HpcError as error:
            for ending in endings:
                ending.refused = error
        else:
            for ending, report in zip(endings, reports, strict=True):
                ending.refused = None if report is None else from_report(report)

    def _confirm(self, lease: Lease) -> None:
        path = f"/w1/held?replica={self._hello.replica}&id={lease.id}&attempt={lease.attempt}"
        self._call(path, None, dict[str, Any])

    def _call(self, path: str, body: bytes | None, as_type: type[T]) -> T:
        """What the daemon answers, however long it is away; a worker that is to end does not wait for long."""
        hurry = self._control.draining
        return self._calls.call(path, body, as_type, hurry=hurry, grace=_DELIVERY, latest=_latest())


def _note_refused(ending: Ending, why: HpcError) -> None:
    lease = ending.lease
    if isinstance(why, Conflict | NotFound):
        words = "the outcome of %s, attempt %d, is not wanted any more\n%s"
        ending.withdraw()
    else:
        words = "the outcome of %s, attempt %d, was not delivered; the daemon will have it run again\n%s"
    logger.warning(words, lease.id, lease.attempt, why, extra={"request": lease.id})


def _latest() -> float:
    """Until when a draining worker may try to reach a daemon that does not answer: it is to end before Slurm ends it."""
    ends = os.environ.get(ENDS_VARIABLE, "")
    return float(ends) - _SPARE if ends.isdigit() else float("inf")
