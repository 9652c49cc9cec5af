"""``python -m nnsight_hpc.slurm.worker.epilogue``: the last act of a job. It says why the worker ended.

A rank that is killed says nothing, and the others cannot tell why they are ended, too. Who started them can: srun, slurmstepd
and mpirun print it. The job's script runs this when they are done; what a rank itself has written down counts more.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nnsight_hpc.slurm.batch.reasons import end_in_words
from nnsight_hpc.slurm.worker.ending import correct, tell, written
from nnsight_hpc.slurm.worker.launchers import Death, death, memory_ran_out, slurms_cause
from nnsight_hpc.slurm.worker.link import DaemonAddress
from nnsight_hpc.wire.errors import ReplicaFailed
from nnsight_hpc.wire.logs import log_as_json
from nnsight_hpc.wire.places import Places, places_at
from nnsight_hpc.wire.states import EndCause
from nnsight_hpc.wire.workers import EndRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

_READ = 64 << 10
"""Bytes of the log's end; what launchers print comes last."""
_KILLED = 128 + 9
_SAID = {
    EndCause.WALLTIME: "the job reached its time limit",
    EndCause.PREEMPTED: "the job was preempted by another one",
    EndCause.NODE_FAILED: "a node of the job failed",
}
_MORE_MEMORY = "ask for more memory with mem, or use more nodes or ranks"


class Job:
    """A job whose ranks have ended, and the end of its log.

    Parameters
    ----------
    code
        The exit code of what had started the ranks.
    met
        Whether all of several ranks had met, so that the launcher fits the MPI library.
    """

    def __init__(self, log: str, ranks: int, code: int, *, met: bool) -> None:
        self._log, self._several, self._code, self._met = log, ranks > 1, code, met

    def failure(self) -> tuple[EndCause, ReplicaFailed]:
        """Why it ended, where nobody wanted that."""
        first = death(self._log)
        if memory_ran_out(self._log):
            return EndCause.OUT_OF_MEMORY, ReplicaFailed(f"{self._who(first)} ran out of memory", next=_MORE_MEMORY)
        return EndCause.CRASHED, self._crash(first)

    def _crash(self, first: Death | None) -> ReplicaFailed:
        how = f"ended: {first.how}" if first else end_in_words(self._code, 0)
        if self._several and not self._met:
            return ReplicaFailed(
                f"the ranks did not come together: {self._who(first)} {how}",
                next="see what srun --mpi=list offers, and give what the MPI library of mpi4py speaks with --mpi (pmix for "
                "Open MPI, pmi2 for MPICH and Intel MPI); without Slurm, mpirun and mpi4py must belong to the same library",
            )
        if re.search(r"killed|signal 9\b", how) or self._code == _KILLED:
            return ReplicaFailed(
                f"{self._who(first)} was killed",
                why="somebody ended it, or its node had no memory left for it",
                next="where it was memory, ask for more with mem; the pool starts another replica",
            )
        return ReplicaFailed(f"{self._who(first)} {how}")

    def _who(self, first: Death | None) -> str:
        if not (first and self._several):
            who = "the launcher of the ranks" if self._several else "the worker"
        else:
            who = f"rank{'s' * (not first.ranks.isdigit())} {first.ranks}"
        return f"{who} on {first.node}" if first and first.node else who


def record(replica: str, places: Places, ranks: int, code: int, told: str) -> EndRecord:
    """The record of the end: what a rank has written, or else what is known from outside.

    Parameters
    ----------
    told
        What the script was told from outside: ``drained``, ``cancelled`` or nothing.
    """
    folder, found = places.replica(replica), written(replica, places)
    log = _end_of(folder / "log")
    if found:
        return _with_slurms_cause(found, log, places)
    if cause := slurms_cause(log):  # also where srun ends with 0, as after the failure of a node
        return _ended(replica, cause, _SAID[cause])
    if told == "cancelled":
        return _ended(replica, EndCause.CANCELLED)
    if not (code or death(log)):
        return _ended(replica, EndCause.DRAINED)
    cause, failure = Job(log, ranks, code, met=(folder / "ranks.json").exists()).failure()
    print(failure, file=sys.stderr)
    return _ended(replica, cause, str(failure))


def _ended(replica: str, cause: EndCause, detail: str = "") -> EndRecord:
    return EndRecord(replica=replica, cause=cause, detail=detail, time=time.time())


def _with_slurms_cause(found: EndRecord, log: str, places: Places) -> EndRecord:
    """A worker that gets SIGTERM cannot know why; where Slurm has said it, that is the cause."""
    if found.cause is not EndCause.CANCELLED or not (cause := slurms_cause(log)):
        return found
    corrected = _ended(found.replica, cause, _SAID[cause])
    correct(corrected, places)
    return corrected


def _end_of(path: Path) -> str:
    if not path.exists():  # submitted by hand, to write elsewhere
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _READ))
        return file.read().decode("utf-8", "replace")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nnsight_hpc.slurm.worker.epilogue", description=__doc__)
    parser.add_argument("--home", required=True, help="the daemon's folder on the shared file system")
    parser.add_argument("--replica", required=True, help="the id that the daemon gave this replica")
    parser.add_argument("--ranks", default=1, type=int, help="how many ranks there were to be  [default: 1]")
    parser.add_argument("--code", required=True, type=int, help="the exit code of what had started them")
    parser.add_argument("--told", required=True, help="what the script was told from outside")
    options = parser.parse_args(arguments)
    # What ends a log is why the worker ended, not how its daemon is.
    log_as_json("worker", replica=options.replica, level=logging.ERROR)
    places = places_at(Path(options.home))
    made = record(options.replica, places, options.ranks, options.code, options.told)
    tell(made, places, DaemonAddress(places))


if __name__ == "__main__":
    main()
