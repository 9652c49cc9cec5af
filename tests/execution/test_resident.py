"""What one request leaves in a model and in torch is gone before the next, which gives what it would give as the first."""

import dataclasses
import functools
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from nnsight_hpc import LanguageModel
from nnsight_hpc.execution.resident import Resident
from tests.oracle.architectures import _LLAMA_LIKE, ARCHITECTURES, LANGUAGE, Subject, _causal, make


def _described(value, depth=0):
    """A value with all that is in it, as far as it can differ."""
    if isinstance(value, torch.Tensor):
        return id(value), value.tolist()
    if isinstance(value, dict):
        return [(str(key), _described(item, depth + 1)) for key, item in value.items()]
    if isinstance(value, list | tuple | set):
        return [_described(item, depth + 1) for item in value]
    if isinstance(value, int | float | str | torch.dtype | None):
        return value
    inner = depth < 4 and not isinstance(value, nn.Module) and not callable(value) and hasattr(value, "__dict__")
    return id(value), _described(vars(value), depth + 1) if inner else None


def _state(module):
    """All that a model's modules hold, and what torch and the generators of the process keep for all."""
    modules = {
        (name, key): _described(value) for name, part in module.named_modules() for key, value in vars(part).items()
    }
    seeds = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    settings = (
        *(
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
        ),
        *(
            torch.are_deterministic_algorithms_enabled(),
            torch.get_default_device(),
            torch.get_float32_matmul_precision(),
        ),
    )
    return {**modules, "seeds": seeds, "settings": settings}


def _changed(before, after):
    return [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]


def _trace(subject, **kwargs):
    tokens = kwargs.pop("tokens", 5)
    with subject.model.trace(subject.inputs(tokens=tokens), **kwargs):
        found = subject.model.output.save()
    return found  # noqa: RET504 - the block may be skipped


def _generate(subject, **kwargs):
    with subject.model.generate(subject.inputs(), max_new_tokens=3, **kwargs):
        found = subject.head_envoy.output.save()
    return found  # noqa: RET504 - as above


def _gradient(subject):
    with subject.model.trace(subject.inputs()):
        value = subject.at(1, "norm").output if subject.language else subject.at(1).output
        gradient = value.grad.save()
        subject.head_envoy.output.sum().backward()
    return gradient


REQUESTS = {
    "trace": _trace,
    "hidden states": functools.partial(_trace, output_hidden_states=True),
    "cache": functools.partial(_trace, use_cache=True),
    "long prompt": functools.partial(_trace, tokens=200),
    "generation": _generate,
    "sampling": functools.partial(_generate, do_sample=True, seed=3),
    "beams": functools.partial(_generate, num_beams=2, output_scores=True, return_dict_in_generate=True),
    "gradient": _gradient,
}


def _with_rope(kind, **parameters):
    """A small Llama with that kind of position encoding, for 64 tokens."""
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, **parameters}
    build = functools.partial(
        _causal, "Llama", num_key_value_heads=2, max_position_embeddings=64, rope_parameters=rope, **_LLAMA_LIKE
    )
    return dataclasses.replace(ARCHITECTURES["llama"], name=kind, make=build)


LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
ALL = {**ARCHITECTURES, "dynamic": _with_rope("dynamic"), "longrope": _with_rope("longrope", **LONG)}


def _made(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, name, ALL[name])
        made = make(name)
    if name not in LANGUAGE and name != "sequential":
        made = Subject(made.architecture, made.module, LanguageModel(made.module), language=True)
    with torch.no_grad():
        made.run(made.inputs())
    return made


_known = functools.cache(_made)
MODELS = [name for name in ALL if name != "sequential"]


@pytest.mark.parametrize(
    ("name", "kind"), [*itertools.product(MODELS, REQUESTS), ("sequential", "trace"), ("sequential", "gradient")]
)
def test_nothing_is_left_of_a_request(name, kind):
    """After any kind of request every module, hook, buffer and configuration, and torch itself, are as they were before it."""
    subject = _known(name)
    resident, before = Resident(subject.module), _state(subject.module)
    REQUESTS[kind](subject)
    assert resident.restore()
    assert _changed(before, _state(subject.module)) == []


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_prompt_after_a_longer_one_gives_the_same(kind):
    """Position encodings that grow with the prompt are those of the first prompt again, bit for bit."""
    subject = _made(kind)
    resident = Resident(subject.module)
    results = []
    for tokens in (80, 200, 80):
        results.append(_trace(subject, tokens=tokens)["logits"])
        assert resident.restore()
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_after_others_asked_for_them_are_the_same(name):
    """What transformers captures of a changed layer does not depend on whether somebody asked for hidden states before."""
    subject = _made(name)
    resident = Resident(subject.module)

    def hidden():
        with subject.model.trace(subject.inputs(), output_hidden_states=True):
            subject.at(1).output = subject.at(0).output
            found = subject.model.output.save()
        assert resident.restore()
        return found["hidden_states"]

    assert all(map(torch.equal, hidden(), hidden()))


class Forgetful(nn.Module):
    """A module whose forward leaves behind what a forward can."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.config = type("Config", (), {})()
        self.config.switches, self.config.name = {"a": [1]}, "first"
        self.cache, self.seen = [], {1}
        self.register_buffer("table", torch.zeros(2))

    def forward(self, value):
        self.config.switches["a"].append(2)
        self.config.name, self.added = "second", torch.ones(1)
        self.cache.append(value)
        self.seen.add(2)
        self.table.add_(1)
        self.register_buffer("other", torch.ones(1))
        self.inner.register_forward_hook(lambda *_: None)
        self.inner.forward = self.inner.forward
        self.train(not self.training)
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(mode=True)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_default_device("meta")
        torch.set_autocast_enabled("cpu", True)
        return self.inner(value.to(device="cpu", dtype=torch.float32))


def test_whatever_a_forward_leaves_is_gone():
    """Attributes, lists, buffers, hooks, modes, generators and the settings of the process are put back."""
    module = Forgetful()
    resident, before = Resident(module), _state(module)
    module(torch.ones(1, 6))
    assert len(_changed(before, _state(module))) > 8
    assert resident.restore()
    assert _changed(before, _state(module)) == []


def test_changed_weight_is_told():
    """A weight is not put back: that it was written into, or put elsewhere, is the answer."""
    module = nn.Linear(2, 2)
    resident = Resident(module)
    assert resident.restore()
    with torch.no_grad():
        module.weight.add_(1)
    assert not resident.restore()
