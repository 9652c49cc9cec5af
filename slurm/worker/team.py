"""The ranks of a replica, from their meeting to the loaded model: who leads, what they load, how they part."""

from __future__ import annotations

import logging
import os
import random
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from nnsight_hpc.models import module_tree
from nnsight_hpc.models.load import find_folder, size_of
from nnsight_hpc.parallel import Guard, Watchdog, form_group, join
from nnsight_hpc.parallel.mpi import MPI
from nnsight_hpc.parallel.tally import Tally
from nnsight_hpc.slurm.worker.loading import as_asked_for
from nnsight_hpc.slurm.worker.node_cache import local_copy
from nnsight_hpc.slurm.worker.ranks import Ranks
from nnsight_hpc.slurm.worker.warmup import first_forward
from nnsight_hpc.wire.errors import Incompatible
from nnsight_hpc.wire.messages import decode, encode
from nnsight_hpc.wire.pools import PoolSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from nnsight_hpc.slurm.worker.control import Control
    from nnsight_hpc.wire.errors import HpcError

_NAP = 0.05
"""Seconds between two looks of a rank that waits for what to load; a daemon may be away for long."""
_LOG_EVERY = 10.0
logger = logging.getLogger(__name__)


class Team:
    """One of the ranks of a replica: this process. Making it is collective.

    Parameters
    ----------
    ranks
        How many there are to be.
    last_words
        Takes the reason when this process has to end at once.
    lost
        Takes the reason when it has to end since a rank hangs.

    Raises
    ------
    HpcError
        The ranks cannot work together; see `parallel.join`.
    """

    def __init__(self, ranks: int, last_words: Callable[[HpcError], None], lost: Callable[[HpcError], None]) -> None:
        self.world = join(last_words)
        if self.world.size != ranks:
            raise Incompatible(
                f"the replica is to have {ranks} ranks, and has {self.world.size}",
                where=f"the world of {self.world.node}",
                next="start it by the script in the replica's folder",
            )
        here = len(self.world.ranks_on(self.world.node))
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads(os.environ, os.cpu_count() or 1, here))
        self._guard = Guard(self.world)
        form_group(self.world, self._guard)
        Watchdog(self.world, self._guard.progress, lost)
        self._comm, self._told = self.world.comm.Dup(), False

    @property
    def leads(self) -> bool:
        return self.world.rank == 0

    def lead(self, spec: PoolSpec, control: Control) -> Ranks:
        """Have all ranks load a model; see `load`. Rank 0 only."""
        self._tell(encode(spec))
        return self.load(spec, control)

    def told(self) -> PoolSpec | None:
        """What rank 0 leads; None when there is nothing to load. The other ranks only."""
        while not self._comm.iprobe(source=0):
            time.sleep(_NAP)
        message = self._comm.recv(source=0)
        return decode(message, PoolSpec) if message else None

    def part(self) -> None:
        """Leave MPI, as all ranks must that end in order; waits for the others."""
        if self.leads and not self._told:
            self._tell(b"")
        MPI.Finalize()

    def _tell(self, message: bytes) -> None:
        self._told = True
        MPI.Request.waitall([self._comm.isend(message, dest=rank) for rank in range(1, self.world.size)])

    def load(self, spec: PoolSpec, control: Control) -> Ranks:
        """Load the model, each rank its part, and run it once; collective.

        Parameters
        ----------
        control
            Hears on rank 0 how many bytes of the model's files the slowest rank has done with, and how many there are.

        Raises
        ------
        HpcError
            On all ranks alike.
        Drained
            On rank 0, when the worker is to end; on the others an `HpcError`.
        """
        from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415 - only after form_group

        from nnsight_hpc.parallel.loading import load_parallel  # noqa: PLC0415 - as above
        from nnsight_hpc.parallel.view import ShardedView  # noqa: PLC0415

        disable_progress_bar()  # one in a log for each rank; how far they are is reported
        world, guard = self.world, self._guard
        report = _Progress([*map(world.name, range(world.size))], control.loading)
        folder = str(self._folder(spec, control))
        loaded = as_asked_for(
            spec,
            load_parallel(folder, world, guard, dtype=spec.dtype, progress=report, replicated=spec.replicated),
        )

        def begin() -> ShardedView:
            module = loaded.module
            how = {"dtype": module.dtype, "attn_implementation": module.config._attn_implementation}  # noqa: SLF001 - its only name
            view = ShardedView(world, module, module_tree(folder, **how))
            first_forward(loaded)
            for seed in (torch.manual_seed, np.random.seed, random.seed):
                seed(0)  # what a model draws without a seed is the same on all ranks; `Resident` keeps it so
            return view

        return Ranks(world, guard, loaded, guard.run(begin))

    def _folder(self, spec: PoolSpec, control: Control) -> Path:
        """Where this rank reads the model from; collective. The watchdog does not look: copying may take long."""
        folder = self._guard.run(lambda: find_folder(spec.model, spec.revision))
        if spec.node_cache is None:
            return folder
        total, neighbours = size_of(folder), self.world.ranks_on(self.world.node)
        tally = Tally(self.world, self._guard.progress, lambda shares: control.copying(int(min(shares) * total), total))
        with tally:
            folder = local_copy(
                folder,
                spec.node_cache,
                moved=lambda there, total: tally.report(there / total),
                leave=control.draining.is_set,
                turn=neighbours.index(self.world.rank),
            )
            tally.report(1.0)
        tally.close()
        met = self._comm.Ibarrier()
        while not met.Test():
            time.sleep(_NAP)
        return folder


def threads(environment: Mapping[str, str], cpus: int, ranks: int) -> int:
    """How many cores of its node a rank may use, of those that the job has there; `ranks` share them.

    Without this each rank would take all of them: ranks that wait for one another spin, and everything takes many times
    as long.
    """
    if (given := environment.get("SLURM_CPUS_PER_TASK", "")).isdigit():
        return int(given)
    job = environment.get("SLURM_CPUS_ON_NODE", "")
    return max(1, (int(job) if job.isdigit() else cpus) // ranks)


class _Progress:
    """Hands on how far the slowest rank is, and writes down, every so often, how far each is."""

    def __init__(self, names: list[str], report: Callable[[int, int], None]) -> None:
        self._names, self._report = names, report
        self._logged = time.monotonic()

    def __call__(self, done: list[int], total: int) -> None:
        if time.monotonic() - self._logged > _LOG_EVERY:
            self._logged = time.monotonic()
            shares = (f"{name} {100 * one / max(1, total):.0f} %" for name, one in zip(self._names, done, strict=True))
            logger.info("loaded so far: %s", ", ".join(shares))
        self._report(min(done), total)
