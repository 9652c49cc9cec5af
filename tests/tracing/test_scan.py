"""Scan and validate: what is known of values while the block is recorded."""

import pytest
import torch

from nnsight_hpc import LanguageModel
from nnsight_hpc.wire.errors import ExecutionFailed

PROMPT = "the tower is in the city of"


def test_shapes_without_weights(tiny_llama):
    """A model whose weights are not loaded tells the shapes of its values, and does not load them."""
    lm = LanguageModel(str(tiny_llama))
    with lm.scan(PROMPT):
        hidden = lm.model.layers[0].output
        shape, dtype, rows = hidden.shape, hidden.dtype, len(hidden)
        first = hidden[0, -1].save()
    assert (shape, dtype, rows) == ((1, 7, 32), torch.float32, 1)
    assert first.shape == (32,)
    assert next(lm._module.parameters()).is_meta


def test_validated_trace_runs(model, net, x):
    """Shapes are real numbers in the block, and the trace gives what it gives without."""
    with model.trace(x, validate=True):
        hidden = model[0].output
        zeros = torch.zeros(hidden.shape[0], 4)
        model[0].output = hidden * (zeros + hidden.ndim)
        out = model.output.save()
    torch.testing.assert_close(out, net[1:](net[0](x) * 2))


def test_wrong_shape_is_an_error_of_its_line(model, x):
    """An operation that cannot work is raised where it is written, and what is below does not happen."""
    reached = False
    with pytest.raises(RuntimeError) as caught, model.trace(x, scan=True):
        model[0].output @ torch.ones(5, 5)
        reached = True
    assert not reached
    assert isinstance(caught.value, ExecutionFailed)
    assert "torch.ones(5, 5)" in str(caught.value)


def test_caught_error_leaves_a_trace_that_runs(model, net, x):
    """An operation that was refused is not part of the trace."""
    with model.trace(x, validate=True):
        with pytest.raises(IndexError):
            model[0].output[:, 99]
        out = model.output.save()
    assert torch.equal(out, net(x))


def test_invokes_grow(model, net, x):
    """Each invoke has the shape of its own rows, and all rows together that of the batch."""
    with model.trace(validate=True) as tracer:
        with tracer.invoke(x[:1]):
            first = model.output.shape
        with tracer.invoke(x[1:]):
            second = model.output.shape
        with tracer.invoke():
            both = model.output
            shape = both.shape
            both = both.save()
    assert (first, second, shape) == ((1, 2), (2, 2), (3, 2))
    torch.testing.assert_close(both, net(x))
