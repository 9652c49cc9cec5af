"""Leader and followers on real MPI ranks; each case is one check, run on all of them."""

import pytest

from tests.parallel.ranks import DEGREES, answers, checks


@pytest.mark.parametrize("name", [*checks("lockstep_checks"), "the end"])
@pytest.mark.parametrize("ranks", DEGREES)
def test_lockstep(ranks, name):
    """What `lockstep_checks` says of requests holds on every rank."""
    assert answers("lockstep_checks", ranks)[name] == ""
