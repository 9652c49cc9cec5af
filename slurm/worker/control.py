"""What the threads of a worker share: its state, and what it has been told to give up."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from nnsight_hpc.wire.states import ReplicaState
from nnsight_hpc.wire.workers import WorkerReport

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.wire.errors import HpcError
    from nnsight_hpc.wire.messages import ModelIdentity
    from nnsight_hpc.wire.workers import Orders, SliceProgress


class Drained(BaseException):
    """Leaves the loading of weights. Not an `Exception`: nothing on the way may take it for a failure."""


class Control:
    """The state of one worker, safe to use from any thread.

    `draining`, `terminating` and `changed` may be waited for: nothing new is to be taken; what runs is to be given
    up too; the heartbeat has something to say. `failure` is why the worker cannot go on, if it cannot.
    `free` is how many bytes one request may need beside the model, once that is known.
    """

    def __init__(self, replica: str, *, ends: float | None = None) -> None:
        self.replica = replica
        self.draining, self.terminating, self.changed = threading.Event(), threading.Event(), threading.Event()
        self.failure: HpcError | None = None
        self.free = 0
        self._lock = threading.Lock()
        self._ends = ends
        self._state = ReplicaState.LOADING
        self._loaded = self._total = self._asked = 0
        self._model: ModelIdentity | None = None
        self._running: tuple[str, ...] = ()
        self._progress: SliceProgress | None = None
        self._is_dumping = False
        self._cancelled: set[str] = set()
        self._give_way: set[str] = set()
        self._on_drain: list[Callable[[], None]] = []

    def copying(self, copied: int, total: int) -> None:
        """Note how many bytes of weights are on this node, of how many; after that they are read."""
        self._loaded, self._total = copied, total

    def loading(self, loaded: int, total: int) -> None:
        """Note how many bytes of weights have been read, of how many; raises `Drained` when the worker is to end."""
        self._loaded, self._total = loaded, total
        self.leave_if_draining()

    def identified(self, model: ModelIdentity) -> None:
        """The model's files have been found: it is known which it is, also before its weights are loaded."""
        with self._lock:
            self._model = model
        self.changed.set()

    def ready(self) -> None:
        """The worker waits for a request, with its model loaded."""
        with self._lock:
            self._running, self._progress, self._is_dumping = (), None, False
        self._become(ReplicaState.READY)

    def busy(self, *requests: str) -> None:
        with self._lock:
            self._running = requests
        self._become(ReplicaState.BUSY)

    def drain(self) -> None:
        """Take nothing new; a request that runs is finished."""
        if not self.draining.is_set():
            self.draining.set()
            self._become(ReplicaState.DRAINING)
            for call in self._on_drain:
                call()

    def leave_if_draining(self) -> None:
        """Raise `Drained` once the worker is to end: what is being loaded is not needed."""
        if self.draining.is_set():
            raise Drained

    def terminate(self) -> None:
        """Take nothing new, and give up what runs at its next module boundary."""
        self.terminating.set()
        self.drain()

    def fail(self, error: HpcError) -> None:
        """End the worker because of `error`; the first one counts."""
        self.failure = self.failure or error
        self.drain()

    def on_drain(self, call: Callable[[], None]) -> None:
        """Have `call` interrupt something when draining begins (at once, when it has begun)."""
        self._on_drain.append(call)
        if self.draining.is_set():
            call()

    def obey(self, orders: Orders) -> None:
        """Do what the daemon wants: give requests up at their next boundary, let others go before dumps, drain."""
        with self._lock:
            self._cancelled.update(orders.cancel)
            self._give_way.update(orders.give_way)
        if orders.drain:
            self.drain()

    def is_cancelled(self, request: str) -> bool:
        """Whether the request is to stop at its next boundary; the model's thread asks."""
        self._asked += 1
        return request in self._cancelled or self.terminating.is_set()

    def was_cancelled(self, request: str) -> bool:
        """Whether somebody cancelled the request itself, and not the worker."""
        return request in self._cancelled

    def gives_way(self, request: str) -> bool:
        """Whether a dump is to let others go first."""
        return request in self._give_way

    def finished(self, request: str) -> None:
        """Forget what was ordered about a request whose outcome has been delivered."""
        with self._lock:
            self._cancelled.discard(request)
            self._give_way.discard(request)

    def progress(self, progress: SliceProgress) -> None:
        with self._lock:
            self._progress = progress
            first, self._is_dumping = not self._is_dumping, True
        if first:
            self.changed.set()

    def progress_to_report(self) -> tuple[str, SliceProgress] | None:
        """The running dump and how far its slice is, once for each change."""
        with self._lock:
            progress, self._progress = self._progress, None
            return None if progress is None else (self._running[0], progress)

    def report(self) -> WorkerReport:
        with self._lock:
            return WorkerReport(
                replica=self.replica,
                state=self._state,
                loaded=self._loaded,
                total=self._total,
                free=self.free,
                model=self._model,
                running=self._running,
                ends=self._ends,
            )

    @property
    def steps(self) -> tuple[int, int]:
        """How far the model's thread is: bytes of weights, and how often it has asked whether to go on with a request."""
        return self._loaded, self._asked

    @property
    def is_loading(self) -> bool:
        return self._state is ReplicaState.LOADING

    @property
    def idle(self) -> bool:
        return self._state is ReplicaState.READY

    @property
    def is_dumping(self) -> bool:
        return self._is_dumping

    def _become(self, state: ReplicaState) -> None:
        with self._lock:
            if self._state is ReplicaState.DRAINING:
                return
            self._state = state
            self.changed.set()
