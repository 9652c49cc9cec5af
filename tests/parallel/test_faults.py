"""Faults in requests on real ranks, from a program's bytes to its result; each case is one check, run on all of them."""

from __future__ import annotations

import tempfile
from functools import cache

import pytest

from nnsight_hpc.parallel.ending import EXIT_CODE
from tests.parallel.fault_life import LIMIT
from tests.parallel.ranks import answers, checks, mostly, mpirun

pytestmark = pytest.mark.timeout(600)  # a hang is found out; ranks that share few cores with other tests are slow


@cache
def found(ranks, faults, *, timeout):
    """What the checks say with so many faults at random places, and the figures of these."""
    with tempfile.NamedTemporaryFile("r") as figures:
        environment = {"NNH_FAULTS": str(faults), "NNH_FIGURES": figures.name, "OMPI_MCA_mpi_yield_when_idle": "1"}
        return answers("fault_checks", ranks, timeout, **environment), f"{ranks} ranks, {figures.read()}"


@pytest.mark.parametrize("name", [*checks("fault_checks"), "the end"])
@pytest.mark.parametrize("ranks", mostly(2))
def test_faults(ranks, name):
    """What `fault_checks` says of faults holds on every rank."""
    assert found(ranks, 20, timeout=500)[0][name] == ""


@pytest.mark.parametrize("faults", [20, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("ranks", mostly(2))
def test_so_many_faults(ranks, faults, capsys):
    """Twenty, or two hundred, faults at random places leave the ranks as they were; it says how soon they were told."""
    said, figures = found(ranks, faults, timeout=3500 if faults > 20 else 500)
    with capsys.disabled():
        print(f"\n{figures}")
    assert said["check_faults_at_random_places"] == ""
    assert f"{ranks} ranks, {faults} faults: an error after" in figures


@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
def test_a_signal_in_a_request_ends_the_job(name, tmp_path):
    """A follower that is stopped ends the job in the watchdog's time, with the reason; one that is killed, without it."""
    code = mpirun(2, ["-m", "tests.parallel.fault_life", name, str(tmp_path)], scratch=tmp_path, timeout=200).wait()
    assert (tmp_path / "struck").exists(), (tmp_path / "output").read_text()[-3000:]
    last = {path.name: path.read_text() for path in tmp_path.glob("last-*")}
    if name == "SIGSTOP":
        assert code == EXIT_CODE
        assert last["last-0"].startswith("rank 1 on ")
        assert f"gave no sign of life for {LIMIT[name]:g} s while a request ran" in last["last-0"]
    else:
        assert code not in {0, 124, EXIT_CODE}
        assert last == {}
