"""The thread that brings requests from the daemon to the model's thread, and takes outcomes back.

It waits for the daemon so that the model's thread need not: an outcome is repeated until it is acknowledged, however
long the daemon is away, and only then is the next request asked for.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, cast

from nnsight_hpc.slurm.worker.link import DECISIVE, DaemonAddress, Link
from nnsight_hpc.slurm.worker.said import Said
from nnsight_hpc.wire.errors import Conflict, HpcError, NotFound
from nnsight_hpc.wire.messages import Lease, Outcome, WorkerHello, WorkerWelcome

if TYPE_CHECKING:
    from nnsight_hpc.slurm.worker.control import Control

_POLL = 20.0
"""Seconds that the daemon may hold a question for work."""
_OFFER = cast("type[Lease | None]", Lease | None)  # typing has no name yet for "a type or a union" (PEP 747)
_DELIVERY = 60.0
"""Seconds for which a draining worker still tries to deliver its last outcome."""
_SAY_EVERY, _SAY_AGAIN = 0.1, 1.0
"""Seconds between two sendings of what a request says, and after one that failed."""
logger = logging.getLogger(__name__)


class _Wake:
    """Stands in the outbox for: the running request has said something."""


class Courier:
    """Leases one request after another. `next`, `say` and `done` are for the model's thread, in turns."""

    def __init__(
        self, control: Control, address: DaemonAddress, hello: WorkerHello, welcome: WorkerWelcome | None
    ) -> None:
        self._control, self._hello, self._welcome = control, hello, welcome
        self._polls, self._calls = Link(address), Link(address)
        self._inbox: SimpleQueue[Lease | None] = SimpleQueue()
        self._outbox: SimpleQueue[Outcome | _Wake | None] = SimpleQueue()
        self._said = self._new_said(attempt=0)
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._control.on_drain(self._polls.abandon)

    def next(self) -> Lease | None:
        """Wait for a request; None when the worker is to end."""
        return self._inbox.get()

    @property
    def datasets(self) -> Path:
        """Where dumps write; known as soon as there is a request."""
        assert self._welcome is not None, "nothing is leased before the daemon's welcome"
        return Path(self._welcome.datasets_folder)

    def say(self, text: str, source: str) -> None:
        """Send on a line that the running request says; it is with the daemon before the request's outcome is."""
        self._said.say(text, source)

    def done(self, outcome: Outcome | None) -> None:
        """Hand over how the request ended; None: it was given up, and the daemon is to lease it to another worker."""
        self._outbox.put(outcome)

    def _run(self) -> None:
        try:
            while not self._control.draining.is_set():
                if lease := self._lease():
                    self._bring(lease)
        except HpcError as error:
            if isinstance(error, DECISIVE):  # otherwise the wait for a daemon was cut short, to drain
                self._control.fail(error)
        except Exception as error:
            logger.exception("the courier failed")
            self._control.fail(HpcError("the worker met an error that it did not expect", why=repr(error)))
        finally:
            self._inbox.put(None)

    def _lease(self) -> Lease | None:
        if self._welcome is None:
            self._register()
        asked = time.monotonic()
        path = f"/w1/lease?replica={self._hello.replica}&wait={_POLL:g}"
        try:
            lease = self._polls.call(path, None, _OFFER, timeout=_POLL + 15)
        except NotFound:  # this daemon has never heard of us
            self._register()
            return None
        except DECISIVE:
            raise
        except HpcError:  # abandoned, to drain
            return None
        if lease is None and time.monotonic() - asked < 1:  # the daemon gives us nothing, and will soon say why
            self._control.changed.set()
            self._control.draining.wait(1)
        return lease

    def _register(self) -> None:
        self._welcome = self._polls.call("/w1/register", self._hello, WorkerWelcome)

    def _new_said(self, attempt: int) -> Said:
        return Said(attempt, lambda: self._outbox.put(_Wake()))

    def _bring(self, lease: Lease) -> None:
        self._said = self._new_said(lease.attempt)
        self._inbox.put(lease)
        with suppress(HpcError):  # of use to who watches only; a lease that is no longer ours shows at the outcome
            self._calls.once(f"/w1/started?{self._query(lease)}", None, dict[str, Any])
        outcome = self._await_outcome(lease)
        self._send_all_said(lease)
        if outcome is not None:
            self._deliver(lease, outcome)
        self._control.finished(lease.id)

    def _await_outcome(self, lease: Lease) -> Outcome | None:
        """Send what the request says, the first line at once and then a few times a second, until it has ended."""
        allowed, due = float("-inf"), None
        while True:
            try:
                item = self._outbox.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
            except Empty:
                allowed = self._send_said(lease) + time.monotonic()
                due = allowed if self._said.part() else None
                continue
            if not isinstance(item, _Wake):
                return item
            due = due or max(time.monotonic(), allowed)

    def _send_said(self, lease: Lease) -> float:
        """Send a part of what there is to send; the seconds until the next."""
        if part := self._said.part():
            at, lines = part
            try:
                self._calls.once(self._log_path(lease, at), lines, dict[str, Any])
            except DECISIVE as error:
                self._not_wanted(lease, error)
            except HpcError:
                return _SAY_AGAIN
            else:
                self._said.has(len(lines))
        return _SAY_EVERY

    def _send_all_said(self, lease: Lease) -> None:
        while part := self._said.part():
            at, lines = part
            try:
                path, hurry = self._log_path(lease, at), self._control.draining
                self._calls.call(path, lines, dict[str, Any], hurry=hurry, grace=_DELIVERY)
            except HpcError as error:
                self._not_wanted(lease, error)
            else:
                self._said.has(len(lines))

    def _not_wanted(self, lease: Lease, error: HpcError) -> None:
        logger.warning("what %s says is not kept any more\n%s", lease.id, error)
        self._said.close()

    def _log_path(self, lease: Lease, at: int) -> str:
        return f"/w1/log?{self._query(lease)}&at={at}"

    def _deliver(self, lease: Lease, outcome: Outcome) -> None:
        path = f"/w1/outcome?replica={self._hello.replica}"
        try:
            self._calls.call(path, outcome, dict[str, Any], hurry=self._control.draining, grace=_DELIVERY)
        except (Conflict, NotFound) as error:
            logger.warning("the outcome of %s, attempt %d, is not wanted any more\n%s", lease.id, lease.attempt, error)
            Path(lease.result).unlink(missing_ok=True)
        except HpcError as error:
            logger.warning(
                "the outcome of %s was not delivered; the daemon will have it run again\n%s", lease.id, error
            )

    def _query(self, lease: Lease) -> str:
        return f"replica={self._hello.replica}&id={lease.id}&attempt={lease.attempt}"
