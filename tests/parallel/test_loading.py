"""Loading models over real MPI ranks; each case is one check, run on all of them."""

import pytest

from tests.parallel.ranks import answers, checks, mostly


@pytest.mark.parametrize("name", [*checks("loading_checks"), "the end"])
@pytest.mark.parametrize("ranks", mostly(3))  # tests/oracle loads models over 2 and 4, too
@pytest.mark.usefixtures("smollm2")
def test_loading(ranks, name):
    """What `loading_checks` says of models over ranks holds on every rank."""
    assert answers("loading_checks", ranks)[name] == ""
