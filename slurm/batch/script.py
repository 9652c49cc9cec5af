"""The text of a job: a bash script that prepares the environment and starts the worker."""

from __future__ import annotations

import shlex
import signal
import sys
from typing import TYPE_CHECKING

from nnsight_hpc.slurm.batch.checks import check_path, check_text
from nnsight_hpc.slurm.batch.executor import ENDS_VARIABLE, JOB_VARIABLE
from nnsight_hpc.slurm.batch.options import check_mpi, farewell, sbatch_arguments, sbatch_options, time_limit
from nnsight_hpc.wire.names import check_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.wire.places import Places
    from nnsight_hpc.wire.pools import PoolSpec

EPILOGUE = "nnsight_hpc.slurm.worker.epilogue"
"""The module that says how a job ended."""
CANCELLED = 128 + signal.SIGTERM
"""The exit code of a job that was ended by SIGTERM, whatever its worker makes of that."""
_PREPARE = """\
# USR2 asks to drain: the daemon sends it when it wants to. It is handed on until the worker has ended, since srun loses a
# signal that comes before its step has started.
# TERM goes to the worker too, so the script only has to outlive it. (An ignored signal would stay ignored in the worker.)
worker= told=
rest() { trap 'kill "$!"; exit' TERM; sleep "$1" & wait "$!"; }  # for a process of its own; fails when it is ended
drain() { while kill -USR2 "$worker" && rest 5; do :; done; }
trap 'if [[ $worker && ! $told ]]; then drain 2>/dev/null & fi; told=${told:-drained}' USR2
trap 'told=cancelled' TERM
ended() {  # only what started a worker knows that it was killed
    kill $(jobs -pr) 2>/dev/null
    %s --code "$1" --told "$told"
    if [[ $told = cancelled ]]; then exit %d; fi
}
trap 'ended $?' EXIT
rm -f end.json ranks.json  # of an earlier run of this script, by hand
"""
_START = """\
if [[ $told ]]; then exit 0; fi
%s &
worker=$!
if [[ $told ]]; then drain 2>/dev/null & fi
while kill -0 "$worker" 2>/dev/null; do wait "$worker"; done  # a trapped signal ends a wait early
wait "$worker"
"""
_SLURM = """\
export SLURM_EXPORT_ENV=ALL  # --export=NONE is meant for this script, not for its steps
"""
_FAREWELL = """\
# A while before the time limit the worker drains, so that the job ends with success.
begun=$(date +%%s) ends=${SLURM_JOB_END_TIME:-$((begun + %d))}
export %s=$ends  # by then the worker has ended, also where nobody takes its last outcome
left=$((ends - begun - %d))
farewell() { rest $((left > 0 ? left : 0)) && kill -USR2 $$; }
farewell 2>/dev/null &
"""
_LOCAL = f"export {JOB_VARIABLE}=$$\n"
_MPIRUN = """\
unset "${!SLURM_@}"  # this machine alone, also within a job of Slurm's
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none
export OMPI_MCA_odls_base_sigkill_timeout=%d  # between TERM and KILL; one second by default
"""
"""For Open MPI 4 and 5; other libraries do not read these, and need none of them."""
_LABEL = 'label=; if [[ $(mpirun --version 2>&1) = *"Open MPI"* ]]; then label=--tag-output; fi'
"""The option with which each line says whose it is. (That of MPICH mixes the lines of ranks up.)"""
_KILL_AFTER = 4
"""Seconds; less than the grace of the embedded executor, so that mpirun itself clears up."""


def worker_command(module: str, replica: str, places: Places, *, ranks: int) -> str:
    """The shell command that starts a worker with the Python that runs this.

    Several ranks run below ``-m mpi4py``: an uncaught error on one of them then aborts all (mpi4py's manual,
    mpi4py.run), where they would otherwise wait for it for ever.
    """
    python = [sys.executable, *(["-m", "mpi4py"] if ranks > 1 else [])]
    several = ["--ranks", str(ranks)] if ranks > 1 else []
    return shlex.join([*python, "-m", module, *_replica(replica, places), *several])


def setup_lines(spec: PoolSpec) -> list[str]:
    """The pool's ``setup``: commands of its owner, one a line."""
    return [check_text(line, "setup") for line in spec.setup]


def sbatch_script(replica: str, spec: PoolSpec, places: Places, *, worker: str, begin: float | None) -> str:
    """The script of a replica's job. Its shell is a login shell, in which ``module`` and the like are defined.

    The worker runs in the background, since bash runs traps only between foreground commands. Memory, nodes and GPUs
    of the step are those of the job; the CPUs of a task have to be said again (srun(1) of 22.05, ``--cpus-per-task``).
    """
    directives = [_directive(*option) for option in sorted(sbatch_options(replica, spec, places, begin).items())]
    raw = [f"#SBATCH {_quoted(argument)}" for argument in sbatch_arguments(spec)]
    before, srun = _srun(spec)
    limit = time_limit(spec.time)
    before = [_SLURM, _FAREWELL % (limit, ENDS_VARIABLE, farewell(limit)), *setup_lines(spec), *before]
    job = _job(replica, spec, places, f"{srun} {worker_command(worker, replica, places, ranks=spec.tp)}", before)
    return "\n".join(["#!/bin/bash -l", *directives, *raw, *job])


def _srun(spec: PoolSpec) -> tuple[list[str], str]:
    """Lines that have to come before srun, and srun with its options."""
    before, mpi = [], "none" if spec.mpi == "auto" else check_mpi(spec.mpi)
    if spec.mpi == "auto" and spec.tp > 1:
        mpi = '"$mpi"'
        before.append(f"mpi=$({shlex.join([sys.executable, '-m', 'nnsight_hpc.slurm.batch.mpi'])}) || exit")
    options = f"--mpi={mpi} --kill-on-bad-exit=1"
    options += " --label" if spec.tp > 1 else ""
    options += f" --cpus-per-task={spec.cpus_per_task}" if spec.cpus_per_task else ""
    if spec.tp % spec.nodes:  # srun does not take a number a node that does not fit, and would fill the first node
        before.append("unset SLURM_NTASKS_PER_NODE")
        options += f" --distribution=plane={spec.ranks_per_node}"
    return before, f"srun {options}"


def local_script(replica: str, spec: PoolSpec, places: Places, *, worker: str) -> str:
    """The script of a replica on this machine: one process, or several that mpirun starts."""
    command = worker_command(worker, replica, places, ranks=spec.tp)
    before = [_LOCAL, *setup_lines(spec)]
    if spec.tp > 1:
        before, command = [_MPIRUN % _KILL_AFTER, *before, _LABEL], f"mpirun $label -n {spec.tp} {command}"
    return "\n".join(["#!/bin/bash", *_job(replica, spec, places, command, before)])


def _job(replica: str, spec: PoolSpec, places: Places, command: str, before: Sequence[str]) -> list[str]:
    """What a script does: lines that come first, the command that starts the ranks, and word of their end."""
    epilogue = [sys.executable, "-m", EPILOGUE, *_replica(replica, places), "--ranks", str(spec.tp)]
    return [_PREPARE % (shlex.join(epilogue), CANCELLED), *before, _START % command]


def _replica(replica: str, places: Places) -> list[str]:
    return ["--home", check_path(places.home), "--replica", check_name(replica, of="replica")]


def _directive(name: str, value: str | None) -> str:
    return f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={_quoted(value)}"


def _quoted(text: str) -> str:
    """`text` as one word for sbatch, which reads quotes as a shell does, but obeys backslashes in all of them."""
    return shlex.quote(text.replace("\\", r"\\"))
