"""A model that the ranks of a replica hold together, and what all of them do with one request.

Rank 0 has checked a request before it leads it: its graph, and its memory on a twin of the whole model. Then the request's
bytes go to all ranks, all run its graph, and rank 0 gets the values. What goes wrong on one of them is one error on all.
With the bytes go the nodes of which only the run can tell whether they may be carried out: there all wait for rank 0.
Of a dump each rank keeps the values, and writes its share of the files (`scribes`).
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.resident import Resident
from nnsight_hpc.execution.shared_guard import SharedGuard
from nnsight_hpc.execution.together import run_together
from nnsight_hpc.parallel import Lockstep, PeerFailed, Stop, Word
from nnsight_hpc.slurm.worker.faults import changed_weights, end_of_gpu, is_fatal, report_of
from nnsight_hpc.slurm.worker.model import Member, Program
from nnsight_hpc.slurm.worker.scribe import OwnScribe, Sealed
from nnsight_hpc.slurm.worker.scribes import Scribes
from nnsight_hpc.wire.errors import RequestCancelled, from_report
from nnsight_hpc.wire.frames import joined, pack, parted, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from nnsight_hpc import parallel
    from nnsight_hpc.execution.estimate import Guard
    from nnsight_hpc.execution.view import FullView
    from nnsight_hpc.models import Loaded
    from nnsight_hpc.parallel.view import ShardedView

_RUN, _SEVERAL, _WRITE, _SCRIBE = range(4)
"""The handlers of the ranks: of a request, of several that share a forward, of a dump's batch, of orders to write."""
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

    def __init__(self, module: torch.nn.Module, view: ShardedView, name: str) -> None:
        self._module, self._view, self._name = module, view, name
        self._view_of_all = view.kept_by_all()
        self._resident = Resident(module)

    def run(self, member: Member) -> dict[str, Any]:
        """What the program saves, where the view keeps it; all ranks call it at once, within `parallel.Guard.run`.

        Raises
        ------
        ReplicaFailed
            This rank cannot go on: its GPU does not work any more, or its weights have changed.
        HpcError
            As `run_graph`; or its memory does not suffice, in words for who sent the request.
        """
        with self._unchanged():
            return self._saved(member, self._view)

    def write(self, member: Member, scribe: OwnScribe) -> None:
        """Have a scribe write this rank's share of what the program saves, which is kept here; else as `run`."""
        with self._unchanged():
            scribe.put(self._saved(member, self._view_of_all, only=[capture.name for capture in scribe.wanted]))

    def run_together(self, members: Sequence[Member]) -> list[dict[str, Any] | Exception]:
        """What each program saves where the view keeps it, or what went wrong with it on all ranks; else as `run`.

        Raises
        ------
        ReplicaFailed, HpcError
            As `run`, where it went wrong on some rank alone, or for all members.
        """
        with self._unchanged():
            return run_together([member.task for member in members], self._module, view=self._view)

    def _saved(self, member: Member, view: FullView, only: Sequence[str] | None = None) -> dict[str, Any]:
        program, cancelled, log, guard = member
        return run_graph(
            program.graph,
            program.tensors,
            self._module,
            cancelled=cancelled,
            log=log,
            guard=guard,
            view=view,
            only=only,
        )

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """The errors of what runs on this rank, in words; what it leaves in the model is put back."""
        try:
            yield
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

    def __init__(self, world: parallel.World, guard: parallel.Guard, loaded: Loaded, view: ShardedView) -> None:
        self.loaded = loaded
        self.sharers = len(world.ranks_on(world.node)) if world.device.type == "cpu" else 1
        self._part = Part(loaded.module, view, world.name(world.rank))
        self._scribe = OwnScribe(world.rank, world.size)
        self._lockstep: Lockstep[Any] = Lockstep(
            world, guard, self._run_here, self._run_several_here, self._write_here, self._obey_here
        )
        self.scribe = Scribes(self._lockstep, self._scribe, _SCRIBE)
        self._agree = view.agree
        self._led: list[Member] | None = None

    def run(self, member: Member) -> dict[str, Any]:
        """As `Model.run`; rank 0 alone asks whether it is cancelled, and hands on what the graph says."""
        result: dict[str, Any] = self._lead([member], _RUN)
        return result

    def write(self, member: Member) -> None:
        """As `Model.write`; each rank writes its share."""
        self._lead([member], _WRITE)

    def run_together(self, members: Sequence[Member]) -> list[dict[str, Any] | Exception]:
        """As `Model.run_together`; of who is asked and told, as in `run`. A cancel ends the forward for all."""
        results: list[dict[str, Any] | Exception] = self._lead(members, _SEVERAL)
        return results

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

    def _lead(self, members: Sequence[Member], handler: int) -> Any:
        """Have all ranks do with these members what the handler does."""

        def stop() -> Stop | None:
            return _CANCELLED if any(member.cancelled and member.cancelled() for member in members) else None

        self._led = [member._replace(guard=self._shared(member.guard)) for member in members]
        try:
            return self._lockstep.lead(_sent(self._led), stop, handler=handler)
        finally:
            self._led = None

    def _shared(self, guard: Guard | None) -> SharedGuard | None:
        return guard and SharedGuard(guard.unchecked, self._agree, guard)

    def _members(self, payload: memoryview) -> list[Member]:
        """Those of a message; rank 0 has read them already."""
        return self._led or [
            Member(program, guard=SharedGuard(unchecked, self._agree) if unchecked else None)
            for program, unchecked in _received(payload)
        ]

    def _run_here(self, payload: memoryview) -> dict[str, Any]:
        """What each rank does with a request."""
        [member] = self._members(payload)
        return self._part.run(member)

    def _run_several_here(self, payload: memoryview) -> list[dict[str, Any] | Exception]:
        """What each rank does with requests that share a forward."""
        return self._part.run_together(self._members(payload))

    def _write_here(self, payload: memoryview) -> None:
        """What each rank does with a dump's batch."""
        [member] = self._members(payload)
        self._part.write(member, self._scribe)

    def _obey_here(self, payload: memoryview) -> list[Sealed] | None:
        """What each rank does with an order to write."""
        return self.scribe.obey(payload)


def _sent(members: Sequence[Member]) -> bytes:
    """The programs as they travel, each with its nodes that are looked at in the run."""
    unchecked = [sorted(member.guard.unchecked) if member.guard else [] for member in members]
    return pack(json.dumps(unchecked).encode(), joined([member.program.frame for member in members]))


def _received(payload: memoryview) -> Iterator[tuple[Program, frozenset[int]]]:
    """Of `_sent`; raises `InvalidInput` and `InvalidGraph` as on rank 0."""
    header, frames = unpack(payload)
    for frame, unchecked in zip(parted(frames), json.loads(header), strict=True):
        yield Program.read(frame), frozenset(unchecked)
