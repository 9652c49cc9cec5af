"""Which PMI srun is to offer: what the MPI library speaks, of what Slurm has; as several versions of both print it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nnsight_hpc.slurm.batch import mpi
from nnsight_hpc.wire.errors import Incompatible

if TYPE_CHECKING:
    from .conftest import Recorded

OPEN_MPI, MPICH = "Open MPI v4.1.4", "MPICH Version:\t4.1.1"
INTEL = "Intel(R) MPI Library 2021.10 for Linux* OS"
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.28.15 (ANL base 3.4a2)"


@pytest.mark.parametrize(
    ("library", "offered", "chosen"),
    [
        (OPEN_MPI, ["pmi2", "pmix", "pmix_v4"], "pmix"),
        (OPEN_MPI, ["pmi2", "pmix_v3", "pmix_v4"], "pmix_v4"),
        (MPICH, ["pmi2", "pmix"], "pmi2"),
        (MPICH, ["pmix"], "pmix"),
        (INTEL, ["cray_shasta", "pmi2"], "pmi2"),
        (CRAY, ["cray_shasta", "pmi2"], "cray_shasta"),
        (CRAY, ["pmi2"], "pmi2"),
        ("Some MPI 1.0", ["pmi2", "pmix"], "pmix"),
    ],
)
def test_the_plugin_is_one_that_the_library_speaks(library: str, offered: list[str], chosen: str) -> None:
    """Open MPI needs PMIx, MPICH and its kin PMI-2, Cray's has its own."""
    assert chosen == mpi.choose(library, offered)


def test_a_pair_that_does_not_fit_is_told_with_both() -> None:
    """The message says what srun offers, which library that is, and what it needs."""
    with pytest.raises(Incompatible) as caught:
        mpi.choose(OPEN_MPI, ["pmi2"])
    assert "it offers pmi2; mpi4py uses Open MPI v4.1.4, which needs pmix" in caught.value.why
    assert "--mpi" in caught.value.next


@pytest.mark.parametrize(
    ("out", "err"),
    [
        (
            "MPI plugin types are...\n\tnone\n\tpmi2\n\tpmix\nspecific pmix plugin versions available: pmix_v3,pmix_v4\n",
            "",
        ),
        ("", "srun: MPI types are...\nsrun: pmix_v4\nsrun: none\nsrun: pmix\nsrun: pmi2\nsrun: pmix_v3\n"),
    ],
)
def test_what_srun_lists_is_read(recorded: Recorded, out: str, err: str) -> None:
    """On stdout and on stderr, with versions on a line of their own or not."""
    recorded.program("srun", out, err)
    assert {"pmi2", "pmix", "pmix_v3", "pmix_v4"} == set(mpi.offered())
    assert recorded.runs("srun") == ["--mpi=list"]


def test_the_program_prints_the_plugin_or_the_error(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    """With the MPI library that is here: one word on stdout, or the error on stderr and its exit code."""
    recorded.program("srun", "MPI plugin types are...\n\tnone\n\tpmi2\n\tpmix\n\tcray_shasta\n")
    assert mpi.main() == 0
    assert capsys.readouterr().out.strip() in {"pmix", "pmi2", "cray_shasta"}
    recorded.program("srun", "MPI plugin types are...\n\tnone\n")
    assert mpi.main() == Incompatible.exit_code
    assert "srun cannot start the ranks" in capsys.readouterr().err
