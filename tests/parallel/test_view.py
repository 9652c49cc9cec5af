"""The full view on real MPI ranks; each case is one check, run on all of them."""

import pytest

from tests.parallel.ranks import answers, checks, mostly


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*checks("view_checks"), "the end"])
@pytest.mark.parametrize("ranks", mostly(3))  # tests/oracle has the others
def test_view(ranks, name):
    """What `view_checks` says of the full view holds on every rank."""
    assert answers("view_checks", ranks, timeout=500)[name] == ""
