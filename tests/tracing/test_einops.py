"""einops on values: each function is one operation of the graph, whenever and however einops was imported."""

import inspect
import subprocess
import sys

import einops
import pytest
import torch
from einops import einsum, pack, parse_shape, rearrange, reduce, repeat, unpack
from torch import nn

from nnsight_hpc import NNsight
from nnsight_hpc.tracing import einops_backend
from nnsight_hpc.wire.errors import InvalidGraph

einops_backend.install()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return NNsight(nn.Sequential(nn.Linear(6, 8), nn.Tanh()).requires_grad_(False))


@pytest.fixture
def x():
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


CALLS = {
    "rearrange": lambda v: rearrange(v, "b (h d) -> b h d", h=2),
    "by the package": lambda v: einops.rearrange(v, "b (h d) -> h b d", d=4),
    "pattern by keyword": lambda v: rearrange(tensor=v, pattern="b d -> d b"),
    "list": lambda v: rearrange([v, v + 1], "n b d -> b (n d)"),
    "reduce": lambda v: reduce(v, "b d -> d", "mean"),
    "reduction by keyword": lambda v: reduce(v, "b d -> b 1", reduction="max"),
    "repeat": lambda v: repeat(v, "b d -> b n d", n=3),
    "einsum": lambda v: einsum(v, torch.eye(8), "batch hidden, hidden out -> batch out"),
    "einsum, value second": lambda v: einsum(torch.ones(2, 3), v, "n b, b d -> n d"),
    "same": lambda v: rearrange(v, "b d -> b d"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_einops_on_a_value_is_one_node(model, x, call):
    """A function of einops on a value is recorded as itself, and gives what it gives on the tensor."""
    with model.trace(x) as tracer:
        result = call(model[0].output).save()
    assert torch.equal(result, call(model._module[0](x)))
    assert sum(node.op.startswith("einops.") for node in tracer.graph.nodes) == 1


def test_pack_and_unpack_are_inverse_on_values(model, x):
    """What `pack` returns of values, `unpack` takes apart; the number of parts is known while the block is recorded."""
    with model.trace(x):
        hidden = model[0].output
        packed, shapes = pack([hidden, hidden.unflatten(1, (2, 4))], "b *")
        one, two = unpack(packed * 2, shapes, "b *")
        packed.save(), one.save(), two.save()
    plain = model._module[0](x)
    expected, plain_shapes = pack([plain, plain.unflatten(1, (2, 4))], "b *")
    assert torch.equal(packed, expected)
    for got, part in zip((one, two), unpack(expected * 2, plain_shapes, "b *"), strict=True):
        assert torch.equal(got, part)


def test_unpack_with_shapes_of_the_researcher(model, x):
    """`unpack` with plain shapes gives as many values as there are shapes."""
    with model.trace(x):
        first, rest = unpack(model[0].output, [(2,), (2, 3)], "b *")
        first.save(), rest.save()
    assert first.shape == (3, 2)
    assert rest.shape == (3, 2, 3)


def test_lengths_of_axes_are_values(model, x):
    """Lengths that `parse_shape` reads off a value can be used for another one."""
    with model.trace(x):
        lengths = parse_shape(model[0].output, "_ hidden")
        square = rearrange(torch.arange(16), "(a hidden) -> a hidden", **lengths).save()
    assert list(lengths) == ["hidden"]
    assert square.shape == (2, 8)


def test_python_function_as_reduction_is_refused(model, x):
    """A reduction that is a function of Python cannot be recorded, and the message says what can."""
    with pytest.raises(InvalidGraph, match="name the reduction"), model.trace(x):
        reduce(model[0].output, "b d -> b", torch.var)


def test_einops_on_tensors_is_as_before():
    """On tensors, einops does what it did: results, errors, signatures, functions as reductions."""
    x = torch.randn(2, 6)
    assert torch.equal(rearrange(x, "a (b c) -> c a b", b=3), x.reshape(2, 3, 2).permute(2, 0, 1))
    assert torch.equal(reduce(x, "a b -> a", lambda t, axes: t.sum(axes)), x.sum(1))
    with pytest.raises(einops.EinopsError, match="can't divide"):
        rearrange(x, "a (b c) -> a b c", b=4)
    assert list(inspect.signature(rearrange).parameters) == ["tensor", "pattern", "axes_lengths"]


@pytest.mark.parametrize("first", ["from einops import rearrange", "import nnsight_hpc.tracing"])
def test_order_of_imports_does_not_matter(first):
    """A name that was imported from einops before tracing was records values, as does one imported after."""
    code = f"""{first}
import torch
from nnsight_hpc import NNsight
from nnsight_hpc.tracing import NNsight
from einops import rearrange
model = NNsight(torch.nn.Linear(2, 6))
with model.trace(torch.ones(3, 2)):
    out = rearrange(model.output, "a (b c) -> a b c", b=2).save()
print(tuple(out.shape))
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "(3, 2, 3)\n"
    )
