"""Collectives on real MPI ranks; each case is one check, run on all of them."""

import pytest

from tests.parallel.ranks import DEGREES, answers, checks


@pytest.mark.parametrize("name", [*checks("collective_checks"), "the end"])
@pytest.mark.parametrize("ranks", DEGREES)
def test_collectives(ranks, name):
    """What `collective_checks` says of a collective holds on every rank."""
    assert answers("collective_checks", ranks)[name] == ""
