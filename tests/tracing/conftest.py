"""Models for tests of tracing: a tiny Llama and a small stack of linear layers, each with its plain module beside it."""

import pytest
import torch
from torch import nn

from nnsight_hpc import LanguageModel, NNsight


@pytest.fixture(scope="module")
def lm(tiny_llama):
    """A language model with its weights."""
    return LanguageModel(str(tiny_llama), dispatch=True)


@pytest.fixture
def net():
    """Three plain layers; `NNsight(net)` wraps them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def model(net):
    return NNsight(net)


@pytest.fixture
def x():
    return torch.linspace(-1, 1, 12).reshape(3, 4)
