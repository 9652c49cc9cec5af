"""Python objects that a forward or `tracer.apply` is given: they go in as they are, in this process only."""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from nnsight_hpc.execution import run_graph
from nnsight_hpc.graph.validation import validate
from nnsight_hpc.tracing import LanguageModel, NNsight
from nnsight_hpc.wire.errors import InvalidGraph, InvalidInput
from tests.oracle.architectures import bare

IDS = torch.tensor([[5, 6, 7, 8]])


class Scale:
    """An object that has no order, no hash and no equality."""

    by = 3.0
    __hash__ = None

    def __eq__(self, other):
        raise NotImplementedError


@pytest.fixture(scope="module")
def model():
    return NNsight(bare("llama"))


def test_cache_of_keys_and_values_is_filled_and_used(model):
    """A trace fills the researcher's own cache in every layer, also if only the first is read, and the next goes on with it."""
    cache, theirs = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model.module(IDS, past_key_values=theirs, use_cache=True)
        expected = model.module(torch.tensor([[9]]), past_key_values=theirs, use_cache=True).logits
    with model.trace(IDS, past_key_values=cache, use_cache=True):
        model.model.layers[0].output.save()
    assert [cache.get_seq_length(layer) for layer in range(len(model.module.model.layers))] == [4] * len(cache)
    with model.trace(torch.tensor([[9]]), past_key_values=cache, use_cache=True):
        logits = model.lm_head.output.save()
    assert torch.equal(logits, expected)


def test_object_of_a_function(model):
    """A Python function gets the very objects that it was given in the block."""
    scale = Scale()
    with model.trace(IDS) as tracer:
        hidden = model.model.layers[0].output.save()
        scaled = tracer.apply(lambda value, how: (value * how.by, how is scale), hidden, how=scale).save()
    assert torch.equal(scaled[0], hidden * 3)
    assert scaled[1] is True
    assert "apply(objects[0], " in str(tracer.graph)


def test_objects_change_from_trace_to_trace(model):
    """The same block with another object each time runs with that object, and keeps none of those before it alive."""
    seen, gone = [], []
    for by in (1.0, 2.0, 3.0):
        scale = Scale()
        scale.by = by
        with model.trace(IDS) as tracer:
            hidden = model.model.layers[0].output.save()
            scaled = tracer.apply(lambda value, how: value * how.by, hidden, scale).save()
        seen.append(torch.equal(scaled, hidden * by))
        gone.append(weakref.ref(scale))
    gc.collect()
    assert seen == [True] * 3
    assert [ref() for ref in gone[:-1]] == [None] * 2


def test_invokes_have_objects_of_their_own(model):
    """Each invoke fills the object that it was given; one object for all of them is refused, since they run in turn."""
    language, caches = LanguageModel(model.module), [DynamicCache(), DynamicCache()]
    with language.trace() as tracer:
        for cache in caches:
            with tracer.invoke(IDS, past_key_values=cache, use_cache=True):
                language.lm_head.output.save()
    assert [cache.get_seq_length() for cache in caches] == [4, 4]
    with pytest.raises(InvalidInput, match="cannot share"), language.trace(past_key_values=DynamicCache()) as tracer:
        for prompt in (IDS, IDS + 1):
            with tracer.invoke(prompt):
                language.lm_head.output.save()


@pytest.mark.parametrize("local", [True, False])
def test_graph_with_an_object_stays_here(model, local):
    """Such a graph has no document, and runs only with its objects."""
    with model.trace(IDS, past_key_values=DynamicCache()) as tracer:
        model.model.layers[0].output.save()
    with pytest.raises(InvalidGraph, match="Python object or function of this process"):
        tracer.graph.to_json()
    if local:
        validate(tracer.graph, local=True)
    else:
        with pytest.raises(InvalidGraph, match="has a Python object as an argument"):
            run_graph(tracer.graph, tracer.graph.tensors, model.module)


def test_operation_takes_no_object(model):
    """An operation of torch refuses what a graph cannot hold, at its line."""
    with pytest.raises(Exception, match="an object of type Scale cannot be recorded"), model.trace(IDS):
        model.model.layers[0].output + Scale()
