"""Faults on real MPI ranks; each case is one check, run on all of them."""

import pytest

from nnsight_hpc.parallel.guard import agreed_error
from nnsight_hpc.parallel.words import Operation, Step, Word
from nnsight_hpc.wire.errors import ErrorReport
from tests.parallel.ranks import DEGREES, answers, checks


@pytest.mark.parametrize("name", [*checks("guard_checks"), "the end"])
@pytest.mark.parametrize("ranks", DEGREES)
def test_guard(ranks, name):
    """What `guard_checks` says of faults holds on every rank."""
    assert answers("guard_checks", ranks)[name] == ""


@pytest.mark.long
@pytest.mark.parametrize("ranks", DEGREES)
def test_guard_for_long(ranks):
    """Two hundred faults at random places leave the ranks as they were."""
    assert answers("guard_checks", ranks, NNH_FAULTS="200")["check_faults_at_random_places"] == ""


def test_agreed_error_keeps_the_first_of_the_worst():
    """Of a cancelling rank and two failed ones, the first failed one's error is told, with the other's."""
    said = [
        (Word.CANCELLED, ErrorReport("RequestCancelled", "cancelled")),
        (Word.FINE, ErrorReport("", "")),
        (Word.FAILED, ErrorReport("HpcError", "no disk", why="full", next="delete")),
        (Word.FAILED, ErrorReport("HpcError", "no memory")),
    ]
    error = agreed_error(said, ["a", "b", "c", "d"])
    assert str(error) == (
        "no disk\n  why: full\n    raised by c (of 4 ranks)\n    a: cancelled\n    d: no memory\n  next: delete"
    )


def test_signatures_tell_steps_apart():
    """Steps that differ in operation, length, size or group have different numbers; the same one has the same everywhere."""
    steps = [Step(operation, count, size) for operation in Operation for count in (0, 1, 4096) for size in (1, 2, 4)]
    assert len({step.signature() for step in steps}) == len(steps)
    assert all(0 <= step.signature() < 2**31 for step in steps)
    assert Step(Operation.ALL_REDUCE, 7, 4, 2).signature() == (((1_000_003 + 7) * 31 + 4) * 127 + 2) % 2**31
