"""The model that a worker holds, in this process alone (`Alone`) or spread over several ranks (`ranks.Ranks`)."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.resident import Resident
from nnsight_hpc.execution.together import Task, run_together
from nnsight_hpc.execution.values import load_tensors, save_tensors
from nnsight_hpc.graph import Graph
from nnsight_hpc.slurm.worker.scribe import OwnScribe
from nnsight_hpc.wire.frames import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from nnsight_hpc.execution.estimate import Guard
    from nnsight_hpc.execution.shared_guard import SharedGuard
    from nnsight_hpc.models import Loaded
    from nnsight_hpc.slurm.worker.scribe import Scribe


_SMALL, _KEPT = 32 << 10, 64
"""Bytes of a graph's document up to which it is remembered, and how many are."""


class Program:
    """A graph with its tensors, and the frame in which they travel: one is made of the other where it is asked for."""

    def __init__(self, graph: Graph, tensors: Mapping[str, torch.Tensor]) -> None:
        self.graph, self.tensors = graph, tensors

    @classmethod
    def read(cls, frame: bytes | memoryview) -> Self:
        """Raises `InvalidInput` and `InvalidGraph` for bytes that are none."""
        header, block = unpack(frame)
        graph = _graph_of(header) if len(header) <= _SMALL else Graph.from_json(header)
        program = cls(graph, load_tensors(block))
        program.frame = frame
        return program

    @cached_property
    def frame(self) -> bytes | memoryview:
        return pack(self.graph.to_json().encode(), save_tensors(self.tensors))


@lru_cache(maxsize=_KEPT)
def _graph_of(header: bytes) -> Graph:
    """A graph that may come again, with other tensors."""
    return Graph.from_json(header)


def silent(_line: str, _source: str) -> None:
    """What becomes of what a graph says where nobody listens."""


class Member(NamedTuple):
    """A program that is to run, alone or with others in one forward; the other fields are arguments of `run_graph`."""

    program: Program
    cancelled: Callable[[], bool] | None = None
    log: Callable[[str, str], None] = silent
    guard: Guard | SharedGuard | None = None

    @property
    def task(self) -> Task:
        return Task(self.program.graph, self.program.tensors, self.cancelled, self.log, self.guard)


class Model(Protocol):
    """A model that runs programs, one at a time, in the thread that made it; a context manager that lets it go.

    Attributes
    ----------
    sharers
        How many processes run each program in the same memory.
    scribe
        Writes what `write` keeps.
    """

    @property
    def loaded(self) -> Loaded: ...

    @property
    def sharers(self) -> int: ...

    @property
    def scribe(self) -> Scribe: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def run(self, member: Member) -> dict[str, Any]:
        """What the program saves; errors as for `run_graph`."""

    def write(self, member: Member) -> None:
        """Run the next batch of the slice that `scribe` has begun, and write what it saves; else as `run`."""

    def run_together(self, members: Sequence[Member]) -> list[dict[str, Any] | Exception]:
        """What each program saves, or what went wrong with it, as `execution.together.run_together`.

        Raises
        ------
        HpcError
            Of a model on several ranks: the forward has ended for all, `RequestCancelled` where one of them was.
        """

    def restore(self) -> bool:
        """Put back what a program has left beside the weights; False where it has changed those."""


class Alone:
    """A model in this process."""

    sharers = 1

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self._resident = loaded, Resident(loaded.module)
        self.scribe = OwnScribe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing: the process ends soon."""

    def run(self, member: Member) -> dict[str, Any]:
        program, cancelled, log, guard = member
        module = self.loaded.module
        return run_graph(program.graph, program.tensors, module, cancelled=cancelled, log=log, guard=guard)

    def write(self, member: Member) -> None:
        self.scribe.put(self.run(member))

    def run_together(self, members: Sequence[Member]) -> list[dict[str, Any] | Exception]:
        return run_together([member.task for member in members], self.loaded.module)

    def restore(self) -> bool:
        return self._resident.restore()
