"""``python -m mpi4py -m tests.parallel.replica_rank RANKS FOLDER``: one rank of a `replica.Replica`.

Rank 0 connects to ``FOLDER/socket`` and answers questions until it is closed. The ranks hold several models in turn: they
follow one until rank 0 turns to another. A model is loaded as a worker loads it, and a request takes a worker's whole way
from its bytes to its result.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import msgspec

from nnsight_hpc.execution.resident import Resident
from nnsight_hpc.slurm.worker import attempt
from nnsight_hpc.slurm.worker.control import Control
from nnsight_hpc.slurm.worker.loop import Runner
from nnsight_hpc.slurm.worker.team import Team
from nnsight_hpc.wire.errors import ReplicaFailed
from nnsight_hpc.wire.frames import joined, pack, parted, unpack
from nnsight_hpc.wire.messages import encode
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.workers import Lease
from tests.oracle.hooks import counting, hooks_of
from tests.parallel.replica import Answer, Question, receive, send

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from nnsight_hpc.slurm.worker.ranks import Ranks


class Watched(Resident):
    """Of a model on which no request may leave a hook, on any rank: a worker would take it off, and say nothing."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self._module, self._before = module, hooks_of(module)

    def restore(self) -> bool:
        left = hooks_of(self._module)
        if left != self._before:
            raise ReplicaFailed(f"hooks stay on {left}, where there were some on {self._before}")
        return super().restore()


class Leader:
    """Rank 0."""

    def __init__(self, team: Team, folder: Path) -> None:
        self._team, self._folder = team, folder
        self._control = Control("replica of tests")
        self._held: dict[PoolSpec, Ranks] = {}
        self._now: Ranks | None = None

    def answer(self, question: Question, frames: Sequence[memoryview]) -> bytes:
        # The specification names the view, too: it is what the followers get.
        spec = PoolSpec(name=question.view, model=question.model, tp=self._team.world.size)
        ranks, said = self._turn_to(spec), defaultdict(list)
        leases = [_lease(self._folder / f"r{number}", frame) for number, frame in enumerate(frames)]
        runner = Runner(ranks, self._control, None)
        with (
            counting(ranks.loaded.module) if question.counted else nullcontext([]) as ran,
            nullcontext() if question.estimated else mock.patch.object(attempt, "guard_of", return_value=None),
            self._cancelling(question, ran),
        ):
            ended = runner.run(leases, self._folder, lambda request, line, _source: said[request].append(line))
            outcomes = {lease.id: outcome for several in ended for lease, outcome in several}
        if self._control.failure is not None:
            raise self._control.failure  # ends the ranks, as it would a worker
        ends = [outcomes[lease.id] for lease in leases]
        answers = [
            Answer(error=end.error, cancelled=end.cancelled, said=tuple(said[end.id]), ran=tuple(ran)) for end in ends
        ]
        return pack(msgspec.json.encode(answers), joined([end.result for end in ends]))

    @contextmanager
    def _cancelling(self, question: Question, ran: Sequence[str]) -> Iterator[None]:
        def is_cancelled(request: str) -> bool:
            return request == f"r{question.cancelled}" and question.after in ran

        with (
            mock.patch.object(self._control, "is_cancelled", is_cancelled),
            mock.patch.object(self._control, "was_cancelled", is_cancelled),
        ):
            yield

    def _turn_to(self, spec: PoolSpec) -> Ranks:
        if spec not in self._held or self._held[spec] is not self._now:
            self.let_go()
            self._team._tell(encode(spec))
            self._now = held_after(self._team, self._held, spec)
        return self._now

    def let_go(self) -> None:
        """The followers wait for what comes next."""
        if self._now is not None:
            self._now.__exit__(None, None, None)
            self._now = None


def _lease(request: Path, frame: memoryview) -> Lease:
    request.write_bytes(frame)
    return Lease(id=request.name, kind="run", attempt=1, request=str(request), result="", user="tests")


def held_after(team: Team, held: dict[PoolSpec, Ranks], spec: PoolSpec) -> Ranks:
    """The model of `spec`, loaded now if it was not yet; collective."""
    if spec not in held:
        from tests.parallel.views import VIEWS  # transformers, which is to be imported after the ranks have met

        with (
            mock.patch("nnsight_hpc.parallel.view.ShardedView", VIEWS[spec.name]),
            mock.patch("nnsight_hpc.slurm.worker.ranks.Resident", Watched),
        ):
            held[spec] = team.load(spec, Control("replica of tests"))
    return held[spec]


def lead(team: Team, folder: Path) -> None:
    leader = Leader(team, folder)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(folder / "socket"))
        while (frame := receive(connection)) is not None:
            header, block = unpack(frame)
            send(connection, leader.answer(msgspec.json.decode(header, type=Question), parted(block)))
    leader.let_go()
    team._tell(b"")


def follow(team: Team) -> None:
    held: dict[PoolSpec, Ranks] = {}
    while (spec := team.told()) is not None:
        held_after(team, held, spec).follow()


def main(ranks: int, folder: Path) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    team = Team(ranks, print, print)
    lead(team, folder) if team.leads else follow(team)
    team.part()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
