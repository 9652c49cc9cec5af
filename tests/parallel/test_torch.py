"""torch.distributed and DTensor on real MPI ranks; each case is one check, run on all of them."""

import pytest

from tests.parallel.ranks import DEGREES, answers, checks


@pytest.mark.parametrize("name", [*checks("torch_checks"), "the end"])
@pytest.mark.parametrize("ranks", DEGREES)
def test_torch(ranks, name):
    """What `torch_checks` says of torch over the group holds on every rank."""
    assert answers("torch_checks", ranks)[name] == ""
