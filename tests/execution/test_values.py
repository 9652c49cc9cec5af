import math

import pytest
import torch

from nnsight_hpc.execution.values import SavedOutput, kept, load_tensors, pack_values, save_tensors, unpack_values
from nnsight_hpc.wire.errors import InvalidInput

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_survives_bit_for_bit(dtype):
    """Every dtype comes back with the same bits, NaN and infinities too."""
    source = torch.tensor([0.0, 1.5, math.inf, -math.inf, math.nan, -0.0])
    tensor = source.to(dtype) if dtype.is_floating_point else source.nan_to_num(1, 2, 3).to(dtype)
    back = unpack_values(pack_values({"a": tensor}))["a"]
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_nested_values_survive():
    """Lists, tuples, numbers, text, shapes, dtypes and outputs come back in their places."""
    value = {"logits": torch.ones(2, 3), "rest": (1, 2.5, None, "ä", [True, torch.zeros(())]), "kind": torch.float16}
    back = unpack_values(pack_values({"out": kept(value, copy=False)}))["out"]
    assert isinstance(back, SavedOutput)
    assert torch.equal(back.logits, back["logits"])
    assert back.rest[:4] == (1, 2.5, None, "ä")
    assert back["kind"] is torch.float16


def test_missing_field_is_named():
    """Asking an output for what it does not have names what it has."""
    with pytest.raises(AttributeError, match="it has logits"):
        _ = SavedOutput(logits=1).hidden


def test_small_view_of_large_memory_is_copied():
    """Keeping one row of a large tensor does not keep the whole of it."""
    large = torch.zeros(1000, 10)
    row = kept(large[3], copy=False)
    assert row.untyped_storage().nbytes() == 40


def test_tensors_that_share_memory_are_both_sent():
    """Two views of one tensor are two tensors on the other side."""
    base = torch.arange(6.0)
    back = load_tensors(save_tensors({"a": base[:3], "b": base.view(2, 3).T}))
    assert torch.equal(back["a"], base[:3])
    assert torch.equal(back["b"], base.view(2, 3).T)


@pytest.mark.parametrize("block", [b"x", b"\xff" * 64, (8).to_bytes(8, "little") + b"{notjson"])
def test_bytes_that_are_no_safetensors_are_refused(block):
    """Garbage in the place of tensors is InvalidInput."""
    with pytest.raises(InvalidInput):
        load_tensors(block)
