"""The model's thread: one request after another, each to an outcome. No request ends the worker."""

from __future__ import annotations

import functools
import logging
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.estimate import check_memory
from nnsight_hpc.execution.estimate_budget import memory_budget
from nnsight_hpc.execution.estimate_guard import Guard
from nnsight_hpc.execution.estimate_watch import Watch
from nnsight_hpc.execution.fake_model import twin_of
from nnsight_hpc.execution.resident import Resident
from nnsight_hpc.execution.structure import scheduled
from nnsight_hpc.execution.values import load_tensors, pack_values
from nnsight_hpc.graph import Graph
from nnsight_hpc.graph.effort import effort
from nnsight_hpc.slurm.worker.dump import dump
from nnsight_hpc.slurm.worker.faults import free_memory, is_fatal, report_of
from nnsight_hpc.wire.errors import ExecutionFailed, HpcError, InvalidInput, NotFound, ReplicaFailed, RequestCancelled
from nnsight_hpc.wire.files import read_if_there, write_atomically
from nnsight_hpc.wire.frames import unpack
from nnsight_hpc.wire.messages import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from nnsight_hpc.models import Loaded
    from nnsight_hpc.slurm.worker.control import Control
    from nnsight_hpc.slurm.worker.courier import Courier
    from nnsight_hpc.wire.messages import Lease

MAX_FRAME = 4 << 30
"""Bytes of a request that are read at most; the daemon takes no larger ones."""
logger = logging.getLogger(__name__)


class Runner:
    """Runs leased requests on the loaded model.

    Parameters
    ----------
    budget
        Bytes that one request may need beside the model; None: what is free.
    """

    def __init__(self, loaded: Loaded, control: Control, budget: int | None) -> None:
        self._loaded, self._control, self._budget = loaded, control, budget
        self._resident = Resident(loaded.module)

    def serve(self, courier: Courier) -> None:
        """Run what the courier brings until it brings nothing more."""
        while (lease := courier.next()) is not None:
            self._control.busy(lease.id)
            outcome = self.run(lease, courier.datasets, courier.say)
            if outcome is not None and outcome.error is not None and self._control.failure is None:
                free_memory()  # only now: until here the error's frames held what the request had
            courier.done(outcome)
            self._control.ready()

    def run(self, lease: Lease, datasets: Path, say: Callable[[str, str], None]) -> Outcome | None:
        """The outcome of one request; None when it was given up because the worker is to end.

        Parameters
        ----------
        datasets
            Where a dump writes its ``NAME.zarr``.
        say
            Takes each line that the request says, and the user's line that said it.
        """
        begun = time.monotonic()
        try:
            with self._unchanged(lease):
                size = self._write_result(lease, datasets, say)
        except RequestCancelled:
            if not self._control.was_cancelled(lease.id):
                return None
            return Outcome(id=lease.id, attempt=lease.attempt, cancelled=True, seconds=time.monotonic() - begun)
        except Exception as error:  # noqa: BLE001 - whatever it was, it becomes the request's error
            return self._failed(lease, error, time.monotonic() - begun)
        seconds = time.monotonic() - begun
        logger.info("%s (%s) done in %.3f s, %d bytes", lease.id, lease.kind, seconds, size)
        last = self._control.progress_to_report()
        progress = last[1] if last else None
        return Outcome(id=lease.id, attempt=lease.attempt, result_bytes=size, seconds=seconds, progress=progress)

    def _write_result(self, lease: Lease, datasets: Path, say: Callable[[str, str], None]) -> int:
        frame = _read_frame(Path(lease.request))
        if lease.kind == "run":
            result = self._run_graph(lease, frame, say)
        elif lease.kind == "dump":
            summary = dump(
                frame,
                self._loaded,
                datasets,
                # A dump goes on where it was, so a draining worker need not wait hours for its end.
                cancelled=lambda: self._control.is_cancelled(lease.id) or self._control.draining.is_set(),
                progress=self._control.progress,
            )
            result = pack_values(summary)
        else:
            raise InvalidInput(f"this worker cannot run requests of kind {lease.kind!r}", next="update nnsight-hpc")
        _write(Path(lease.result), result)
        return len(result)

    def _run_graph(self, lease: Lease, frame: memoryview, say: Callable[[str, str], None]) -> bytes:
        header, block = unpack(frame)
        cancelled = functools.partial(self._control.is_cancelled, lease.id)
        with effort(cancelled):
            graph, tensors = Graph.from_json(header), load_tensors(block)
            scheduled(graph, local=False)  # refused or not, before its memory is estimated
        guard = self._guard(graph, tensors, cancelled)
        values = run_graph(graph, tensors, self._loaded.module, cancelled=cancelled, log=say, guard=guard)
        return pack_values(values)

    @contextmanager
    def _unchanged(self, lease: Lease) -> Iterator[None]:
        """Put back what a request leaves in the model beside its weights; end the worker when it has changed those.

        Nothing that is known of can do that.
        """
        try:
            yield
        finally:
            if not self._resident.restore():
                self._control.fail(ReplicaFailed("a request changed the weights of the resident model", where=lease.id))

    def _guard(self, graph: Graph, tensors: dict[str, torch.Tensor], cancelled: Callable[[], bool]) -> Guard:
        """What is left to check in the run. Raises `InvalidGraph` when the graph would take too much memory.

        An operation that cannot work is left to the run, which then says it in the same words as a run elsewhere; the
        estimate does not cover what comes after it, so every node is looked at then.
        """
        module = self._loaded.module
        try:
            return check_memory(graph, tensors, module, self._budget, cancelled=cancelled)
        except ExecutionFailed:
            twin = twin_of(module)
            budget = memory_budget(twin.device) if self._budget is None else self._budget
            return Guard(twin, 0, frozenset(range(len(graph.nodes))), budget, Watch(twin.device, budget))

    def _failed(self, lease: Lease, error: Exception, seconds: float) -> Outcome:
        logger.info("%s (%s) failed after %.3f s: %s", lease.id, lease.kind, seconds, error)
        report = report_of(error)
        if is_fatal(error):
            self._control.fail(
                ReplicaFailed("the GPU does not work any more after a failed request", where=lease.id, why=report.what)
            )
        return Outcome(id=lease.id, attempt=lease.attempt, error=report, seconds=seconds)


def _read_frame(path: Path) -> memoryview:
    data = read_if_there(path) if not path.exists() or path.stat().st_size <= MAX_FRAME else b""
    if data is None:
        raise NotFound("the request's bytes are not there", where=str(path), next="send it again")
    if not data:
        raise InvalidInput(f"the request has no bytes, or more than {MAX_FRAME}", where=str(path))
    return memoryview(data)


def _write(path: Path, result: bytes) -> None:
    try:
        write_atomically(path, result)
    except OSError as error:
        raise HpcError(
            f"the result ({len(result)} bytes) could not be written",
            where=str(path),
            why=str(error),
            next="free space there, or save less",
        ) from error
