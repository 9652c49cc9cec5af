"""Errors of a run as the researcher meets them."""

import pytest
import torch
from torch import nn

from nnsight_hpc import NNsight
from nnsight_hpc.wire.errors import ExecutionFailed, from_report


class Full(nn.Module):
    """Raises what torch raises when a GPU has no memory left."""

    def forward(self, value):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.")


def test_a_gpu_without_memory_raises_torch_s_type_and_a_memory_error():
    """Whoever catches `torch.OutOfMemoryError` or `MemoryError` gets it; where torch is not, a `MemoryError` arrives."""
    model = NNsight(nn.Sequential(Full(), nn.Identity()))
    with pytest.raises(torch.OutOfMemoryError, match="out of memory") as caught, model.trace(torch.ones(2)):
        model[1].output.save()
    assert isinstance(caught.value, ExecutionFailed)
    assert isinstance(caught.value, MemoryError)
    sent = from_report(caught.value.report())
    assert isinstance(sent, MemoryError)
    assert "CUDA out of memory" in str(sent)
