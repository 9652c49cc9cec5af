"""Joining the world, and every way in which it goes wrong before weights are read."""

import subprocess
import sys

import pytest

from nnsight_hpc.parallel.devices import check_gpus
from nnsight_hpc.parallel.launcher import check_launcher
from nnsight_hpc.wire.errors import Incompatible, InvalidInput
from tests.parallel.ranks import DEGREES, ROOT, answers, checks, mpirun


@pytest.mark.parametrize("name", [*checks("world_checks"), "the end"])
@pytest.mark.parametrize("ranks", DEGREES)
def test_world(ranks, name):
    """What `world_checks` says of the world holds on every rank."""
    assert answers("world_checks", ranks)[name] == ""


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "1"},  # mpirun inside a job step
        {"PMI_SIZE": "4", "PMIX_RANK": "3"},
        {"SLURM_STEP_NUM_TASKS": "4"},
        {"SLURM_NTASKS": "8"},  # a shell of salloc
    ],
)
def test_a_launcher_that_agrees(environment):
    """The number of ranks that whoever started this process says is the world's."""
    check_launcher(environment, rank=0, size=4, node="n1")


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "the launcher started 4 ranks, and MPI sees 1"),
        ({"PMI_SIZE": "2"}, "the launcher started 2 ranks, and MPI sees 1"),
        ({"SLURM_STEP_NUM_TASKS": "16"}, "the launcher started 16 ranks, and MPI sees 1"),
        ({"PMIX_RANK": "3"}, "the launcher calls this process rank 3, and MPI sees 1 rank"),
    ],
)
def test_a_launcher_that_does_not_fit(environment, what):
    """N worlds of one rank are refused, with the variable that says so and what to do."""
    with pytest.raises(Incompatible) as caught:
        check_launcher(environment, rank=0, size=1, node="n1")
    assert caught.value.what == what
    assert caught.value.where == "rank 0 on n1"
    assert "srun --mpi=list" in caught.value.next


def test_a_process_that_srun_started_without_its_mpi():
    """A real process with the variables of a step of two tasks, alone in its world, ends with that error."""
    code = "from nnsight_hpc.parallel import join; join(print)"
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "SLURM_STEP_NUM_TASKS": "2", "OMPI_ALLOW_RUN_AS_ROOT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode != 0
    assert "Incompatible: the launcher started 2 ranks, and MPI sees 1" in done.stderr


def test_a_rank_that_never_joins_is_named(tmp_path):
    """Of three ranks of which one does not join, the others hear which it is, in time."""
    program = ["-m", "tests.parallel.absent", "after MPI_Init", "10", str(tmp_path)]
    assert mpirun(3, program, scratch=tmp_path).wait() != 0
    heard = {path.name: path.read_text() for path in tmp_path.glob("heard-*")}
    assert heard.keys() == {"heard-0", "heard-2"}
    assert all(text.startswith("rank 1 of 3 did not answer within ") for text in heard.values())


def test_a_rank_that_never_enters_mpi_ends_the_others(tmp_path):
    """A rank that waits in MPI_Init, which nothing can interrupt, says why and ends."""
    program = ["-m", "tests.parallel.absent", "before MPI_Init", "3", str(tmp_path)]
    assert mpirun(2, program, scratch=tmp_path).wait() != 0
    assert (tmp_path / "heard-0").read_text().startswith("the ranks did not meet within 3 s\n  where: MPI_Init, on ")


def test_without_an_mpi_library():
    """Where libmpi cannot be loaded, importing the package says what to install or load."""
    code = "import sys; sys.modules['mpi4py'] = None; import nnsight_hpc.parallel"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert "NotFound: no MPI library can be used from Python" in done.stderr
    assert "module load openmpi" in done.stderr


def test_gpus_that_suffice():
    """Ranks with a GPU each, by UUID, are well, also where each sees only its own; so is a world without any."""
    check_gpus("n1", {0: ("uuid-a", 2), 1: ("uuid-b", 2)}, needed=True)
    check_gpus("n1", {0: ("uuid-a", 1), 1: ("uuid-b", 1)}, needed=True)
    check_gpus("n1", {0: ("", 0), 1: ("", 0)}, needed=False)


@pytest.mark.parametrize(
    "gpus",
    [{0: ("uuid-a", 1), 1: ("uuid-a", 1)}, {0: ("uuid-a", 1), 1: ("", 0)}, {2: ("", 0), 3: ("", 0)}],
    ids=["one for two", "one rank sees none", "a node without"],
)
def test_gpus_that_do_not_suffice(gpus):
    """Two ranks on one GPU, a rank without one, a node without any beside nodes that have them: refused, with the counts."""
    with pytest.raises(InvalidInput, match=r"n1 has 2 ranks and [01] GPUs for them") as caught:
        check_gpus("n1", gpus, needed=True)
    assert "gpus_per_node" in caught.value.next
