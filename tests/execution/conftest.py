"""A small network whose inside is easy to compute by hand, and a recorder of the oracle: plain PyTorch hooks."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from nnsight_hpc.graph import GraphBuilder, TensorRef
from nnsight_hpc.wire.messages import ModelIdentity


@pytest.fixture
def net():
    """Four linear layers with activations between them, seeded."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5)).requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


class Builder(GraphBuilder):
    """A graph under construction with one forward over the tensor `x`."""

    def __init__(self):
        super().__init__()
        self.forward = self.add("model.forward", TensorRef("x"))

    def graph(self, **saves):
        return self.build(saves, ModelIdentity(id="net"))


@pytest.fixture
def builder():
    return Builder()


@contextmanager
def hooked(module, hook):
    """Plain PyTorch: run with one forward hook."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
