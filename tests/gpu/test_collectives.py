"""Collectives on GPUs; each case is one check, run on all ranks."""

import pytest
import torch

from tests.parallel.ranks import answers, checks

NAMES = [*checks("collective_checks"), "the end"]


@pytest.mark.parametrize("name", NAMES)
def test_staging(name):
    """What `collective_checks` says of a collective holds for tensors on a GPU, over MPI, between ranks that share it."""
    assert answers("collective_checks", 2, CUDA_VISIBLE_DEVICES="0", NNH_SHARED_GPU="1")[name] == ""


@pytest.mark.parametrize("name", NAMES)
def test_nccl(name):
    """What `collective_checks` says of a collective holds over NCCL, between as many GPUs as there are (up to four)."""
    count = min(torch.cuda.device_count(), 4)
    assert answers("collective_checks", count, CUDA_VISIBLE_DEVICES=",".join(map(str, range(count))))[name] == ""
