"""A job that loads weighs less on the cores of its machine than others, and as much as they once it serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="a kernel without autogroups")

PROGRAM = """
from pathlib import Path
from nnsight_hpc.slurm.worker.manners import step_back, step_forward
def nice():
    print(Path("/proc/self/autogroup").read_text().split()[-1])
nice()
step_back()
nice()
step_forward()
nice()
"""


@pytest.mark.parametrize(
    ("job", "expected"),
    [({"SLURM_STEP_ID": "0"}, ["0", "5", "0"]), ({"NNSIGHT_HPC_JOB": "1"}, ["0", "5", "0"]), ({}, ["0", "0", "0"])],
)
def test_only_a_job_steps_back_and_forward(job, expected):
    """The weight of a job's session is lowered and raised again, also by who is not root; that of a terminal never is."""
    user = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 and _is_open() else {}
    environment = {
        name: value for name, value in os.environ.items() if name not in {"SLURM_STEP_ID", "NNSIGHT_HPC_JOB"}
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | job,
        start_new_session=True,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        **user,
    )
    assert expected == done.stdout.split()


def _is_open() -> bool:
    """Whether everybody can run this Python, which may lie in root's home."""
    return all(folder.stat().st_mode & 0o001 for folder in Path(sys.executable).resolve().parents)
