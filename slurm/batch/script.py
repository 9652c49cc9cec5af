"""The text of a job: a bash script that prepares the environment and starts the worker."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

from nnsight_hpc.slurm.batch.checks import check_path, check_text
from nnsight_hpc.slurm.batch.options import sbatch_arguments, sbatch_options
from nnsight_hpc.wire.names import check_name

if TYPE_CHECKING:
    from nnsight_hpc.wire.messages import PoolSpec
    from nnsight_hpc.wire.places import Places

_PREPARE = """\
export SLURM_EXPORT_ENV=ALL  # --export=NONE is meant for this script, not for its steps

# USR2 asks to drain: Slurm sends it before the time limit, the daemon when it wants to. It is handed on until the worker
# has ended, since srun loses a signal that comes before its step has started.
# TERM goes to the worker too, so the script only has to outlive it. (An ignored signal would stay ignored in the worker.)
draining= worker=
drain() { while kill -USR2 "$worker" 2>/dev/null; do sleep 5; done; }
trap 'if [[ $worker && ! $draining ]]; then drain & fi; draining=1' USR2
trap : TERM
"""
_START = """\
if [[ $draining ]]; then exit; fi
%s &
worker=$!
if [[ $draining ]]; then drain & fi
while kill -0 "$worker" 2>/dev/null; do wait "$worker"; done  # a trapped signal ends a wait early
wait "$worker"
"""


def worker_command(module: str, replica: str, places: Places, *, tasks: int) -> str:
    """The shell command that starts a worker with the Python that runs this.

    Several tasks run below ``-m mpi4py``: an uncaught error on one rank then aborts all ranks (mpi4py's manual,
    mpi4py.run), where they would otherwise wait for it for ever.
    """
    python = [sys.executable, *(["-m", "mpi4py"] if tasks > 1 else [])]
    home = check_path(places.home)
    return shlex.join([*python, "-m", module, "--home", home, "--replica", check_name(replica, of="replica")])


def setup_lines(spec: PoolSpec) -> list[str]:
    """The pool's ``setup``: commands of its owner, one a line."""
    return [check_text(line, "setup") for line in spec.setup]


def sbatch_script(replica: str, spec: PoolSpec, places: Places, *, worker: str, mpi: str) -> str:
    """The script of a replica's job. Its shell is a login shell, in which ``module`` and the like are defined.

    The worker runs in the background, since bash runs traps only between foreground commands. Memory, nodes and GPUs
    of the step are those of the job; the CPUs of a task have to be said again (srun(1) of 22.05, ``--cpus-per-task``).
    """
    tasks = spec.nodes * spec.tasks_per_node
    directives = [_directive(*option) for option in sorted(sbatch_options(replica, spec, places).items())]
    raw = [f"#SBATCH {_quoted(argument)}" for argument in sbatch_arguments(spec)]
    step = ["srun", f"--mpi={mpi}", "--kill-on-bad-exit=1"]
    step += [f"--cpus-per-task={spec.cpus_per_task}"] if spec.cpus_per_task else []
    command = f"{shlex.join(step)} {worker_command(worker, replica, places, tasks=tasks)}"
    return "\n".join(["#!/bin/bash -l", *directives, *raw, _PREPARE, *setup_lines(spec), _START % command])


def _directive(name: str, value: str | None) -> str:
    return f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={_quoted(value)}"


def _quoted(text: str) -> str:
    """`text` as one word for sbatch, which reads quotes as a shell does, but obeys backslashes in all of them."""
    return shlex.quote(text.replace("\\", r"\\"))
