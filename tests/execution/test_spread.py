"""Parameters that are spread over processes (DTensors): their memory here is protected, and a change of it is seen."""

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from nnsight_hpc.execution.memory import Weights
from nnsight_hpc.execution.resident import Resident


@pytest.fixture
def spread():
    """A layer whose weight is sharded and whose bias is replicated, over a group of this process alone."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer = nn.Linear(4, 4).requires_grad_(False)
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(0)]), requires_grad=False)
        layer.bias = nn.Parameter(distribute_tensor(layer.bias.data, mesh, [Replicate()]), requires_grad=False)
        yield layer
    finally:
        dist.destroy_process_group()


def test_their_memory_is_the_models(spread):
    """What lies in the memory of a part is held, also where a whole tensor is a view of it; a copy is not."""
    weights = Weights(spread)
    assert weights.hold(spread.weight.to_local())
    assert weights.hold(spread.bias.full_tensor())
    assert not weights.hold(spread.bias.full_tensor().clone())


@pytest.mark.parametrize("change", [lambda p: p.add_(1), lambda p: p.to_local().add_(1)], ids=["whole", "part"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_change_is_seen(spread, name, change):
    """Whether the tensor or its part here was written into, the model is not as before; without a change it is."""
    resident = Resident(spread)
    assert resident.restore()
    change(getattr(spread, name))
    assert not resident.restore()


class Group(dist.ProcessGroup):
    """A process group written in Python."""


def test_what_torch_keeps_of_processes_is_left_alone(spread):
    """A process group that a module leads to goes on meanwhile, and is not put back."""
    spread.group = group = Group(0, 1)
    resident = Resident(spread)
    group.note = "of a later request"
    assert resident.restore()
    assert group.note == "of a later request"
