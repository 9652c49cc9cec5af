"""A model that the ranks of a replica hold together, and what all of them do with one request.

Rank 0 has checked a request before it leads it: its graph, and its memory on a twin of the whole model. Then the request's
bytes go to all ranks, all run its graph, and rank 0 gets the values. What goes wrong on one of them is one error on all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.resident import Resident
from nnsight_hpc.parallel import Lockstep, PeerFailed, Stop, Word
from nnsight_hpc.slurm.worker.faults import changed_weights, end_of_gpu, is_fatal, report_of
from nnsight_hpc.slurm.worker.model import Program, silent
from nnsight_hpc.wire.errors import RequestCancelled, from_report

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from nnsight_hpc import parallel
    from nnsight_hpc.execution.estimate import Guard
    from nnsight_hpc.execution.view import FullView
    from nnsight_hpc.models import Loaded

_CANCELLED = Stop(Word.CANCELLED, RequestCancelled("the request was cancelled while it ran"))


class Part:
    """One rank's part of a model that has run once, and how a program runs on it.

    Parameters
    ----------
    view
        Shows whole tensors.
    name
        What to call this rank in an error.
    """

    def __init__(self, module: torch.nn.Module, view: FullView, name: str) -> None:
        self._module, self._view, self._name = module, view, name
        self._resident = Resident(module)

    def run(
        self,
        program: Program,
        *,
        cancelled: Callable[[], bool] | None = None,
        log: Callable[[str, str], None] = silent,
        guard: Guard | None = None,
    ) -> dict[str, Any]:
        """What the program saves, where the view keeps it; all ranks call it at once, within `parallel.Guard.run`.

        Raises
        ------
        ReplicaFailed
            This rank cannot go on: its GPU does not work any more, or its weights have changed.
        HpcError
            As `run_graph`; or its memory does not suffice, in words for who sent the request.
        """
        try:
            return run_graph(
                program.graph, program.tensors, self._module, cancelled=cancelled, log=log, guard=guard, view=self._view
            )
        except PeerFailed:
            raise
        except Exception as error:
            raise self._in_words(error) from error
        finally:
            if not self._resident.restore():
                raise changed_weights(self._name)

    def restore(self) -> bool:
        """Put back what was left beside the weights, which each program does at its end; whether that could be done."""
        return self._resident.restore()

    def _in_words(self, error: Exception) -> Exception:
        report = report_of(error)
        return end_of_gpu(report, self._name) if is_fatal(error) else from_report(report)


class Ranks:
    """The model as one rank has it; creating it is collective. Rank 0 calls `run`, the others `follow`.

    On rank 0 it is a context manager that lets the others go at the end.
    """

    def __init__(self, world: parallel.World, guard: parallel.Guard, loaded: Loaded, view: FullView) -> None:
        self.loaded = loaded
        self.sharers = len(world.ranks_on(world.node)) if world.device.type == "cpu" else 1
        self._part = Part(loaded.module, view, world.name(world.rank))
        self._lockstep = Lockstep(world, guard, self._run_here)
        self._led: Callable[[], dict[str, Any]] | None = None

    def run(
        self,
        program: Program,
        *,
        cancelled: Callable[[], bool] | None = None,
        log: Callable[[str, str], None] = silent,
        guard: Guard | None = None,
    ) -> dict[str, Any]:
        """As `Model.run`; rank 0 alone asks `cancelled` and `guard`, and hands on what the graph says."""

        def run() -> dict[str, Any]:
            return self._part.run(program, cancelled=cancelled, log=log, guard=guard)

        self._led = run
        try:
            return self._lockstep.lead(program.frame, lambda: _CANCELLED if cancelled and cancelled() else None)
        finally:
            self._led = None

    def follow(self) -> None:
        """Run what rank 0 leads, until it lets us go."""
        self._lockstep.follow()

    def restore(self) -> bool:
        """As `Model.restore`; the other ranks have done it at the end of each program."""
        return self._part.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lockstep.__exit__(*error)

    def _run_here(self, payload: memoryview) -> dict[str, Any]:
        """What each rank does with a request's bytes; rank 0 has read them already."""
        return self._led() if self._led else self._part.run(Program.read(payload))
