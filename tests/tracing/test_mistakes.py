"""What goes wrong easily in a block is refused with what to write instead; what was saved elsewhere than in a name works."""

import collections
import copy
import pickle
import types

import numpy as np
import pytest
import torch
from torch import nn

from nnsight_hpc import Graph, LanguageModel, NNsight
from nnsight_hpc.wire.errors import InvalidGraph, InvalidInput

Pair = collections.namedtuple("Pair", "first second")  # noqa: PYI024 - as researchers write it


@pytest.mark.parametrize(
    "use",
    [
        lambda other: other[0].output,
        lambda other: other[0](torch.ones(3, 4)),
        lambda other: other[0].weight,
        lambda other: other[0].skip(1),
        lambda other: other[0].source,
        lambda other: list(other.parameters()),
        lambda other: setattr(other[0], "output", 1),
    ],
)
def test_modules_of_another_model(model, x, use):
    """They are refused in a trace, and in a session's."""
    other = NNsight(nn.ModuleList([nn.Linear(4, 4)]))
    with (
        pytest.raises(InvalidInput, match=r"another model.*to ModuleList, and the block runs Sequential"),
        model.trace(x),
    ):
        use(other)
    with pytest.raises(InvalidInput, match="another model"), model.session(), model.trace(x):
        use(other)
    with pytest.raises(InvalidInput, match="another model"), model.trace(x) as tracer:
        tracer.cache([other[0]])


def test_copies_of_a_model_are_that_model(model, net, x):
    """An edited copy, and another wrapper of the same module, may be used in its traces."""
    with model.edit() as edited:
        edited[0].output = edited[0].output * 1
    with model.trace(x):
        values = [edited[0].output.save(), NNsight(net)[0].output.save()]
    with edited.trace(x):
        values += [model[0].output.save(), edited[0].output.save()]
    assert all(torch.equal(value, net[0](x)) for value in values)


@pytest.mark.parametrize(
    "use", [np.array, np.asarray, copy.copy, copy.deepcopy, pickle.dumps, round, lambda value: f"{value:.3f}"]
)
def test_what_needs_the_value_now(model, x, use):
    """Arrays, copies, pickles and texts of a value are refused while the block is recorded."""
    with pytest.raises(InvalidInput, match="not known while the block is recorded"), model.trace(x):
        use(model[0].output.sum())


def test_values_in_other_places_than_names(model, net, x):
    """A saved value that is bound to an attribute acts as its result, after the block and in the next one."""
    kept = types.SimpleNamespace()
    with model.trace(x):
        kept.hidden = model[0].output.save()
        kept.number = model[0].output.sum().item().save()
    hidden = net[0](x)
    assert torch.equal(kept.hidden.result(), hidden)
    assert (kept.hidden.shape, len(kept.hidden), kept.hidden.tolist()) == (hidden.shape, 3, hidden.tolist())
    assert torch.equal(torch.cat([kept.hidden, hidden - kept.hidden]), torch.cat([hidden, hidden * 0]))
    assert torch.equal(torch.stack(list(kept.hidden)), hidden)
    assert np.array_equal(np.asarray(kept.hidden), hidden.detach().numpy())
    assert torch.equal(copy.deepcopy(kept.hidden), hidden)
    assert f"{kept.number:.3f}" == f"{hidden.sum().item():.3f}"
    assert repr(kept.hidden) == repr(kept.hidden.result())
    with model.trace(x):
        differences = [(model[0].output - kept.hidden).save(), (kept.hidden - model[0].output).save()]
    assert not any(difference.any() for difference in differences)


def test_containers_of_other_types(model, net, x):
    """Values in a defaultdict, an OrderedDict, a deque and a named tuple are bound; the containers stay what they are."""
    lists, ordered, queue = collections.defaultdict(list), collections.OrderedDict(), collections.deque(maxlen=2)
    with model.trace(x):
        lists["a"].append(model[0].output.save())
        ordered["b"] = model[0].output.save()
        queue.append(model[0].output.save())
        pair = Pair(model[0].output.save(), 3)
    assert (type(lists), type(queue), queue.maxlen, type(pair), pair.second) == (
        collections.defaultdict, collections.deque, 2, Pair, 3,
    )  # fmt: skip
    for found in (lists["a"][0], ordered["b"], queue[0], pair.first):
        assert type(found) is torch.Tensor
        assert torch.equal(found, net[0](x))


def test_values_of_a_failed_block(model, x):
    """A saved value of a block that failed says so."""
    kept = []
    with pytest.raises(ZeroDivisionError), model.trace(x):
        kept.append(model[0].output.save())
        raise ZeroDivisionError
    with pytest.raises(InvalidInput, match="its block failed"):
        _ = kept[0] + 1


def test_misspelt_method(model, x):
    """The nearest methods of tensors are named."""
    with pytest.raises(InvalidInput, match="a tensor has no 'summ'; did you mean sum"), model.trace(x):
        model[0].output.summ()


def test_assignment_into_the_caller_s_tensor(model, x):
    """It is refused with what to do."""
    with pytest.raises(InvalidGraph, match="assign after the block"), model.trace(x):
        torch.zeros(3)[0] = model[0].output.sum()


def test_an_index_that_is_no_module(model):
    """The number of modules is named."""
    with pytest.raises(IndexError, match="has 3 modules, and none at 9"):
        _ = model[9]
    assert model[-1]._path == "2"


def test_weights_outside_of_a_block(lm):
    """The error names the torch module's parameter."""
    with pytest.raises(InvalidInput, match=r"model\.module\.model\.layers\[0\]\.mlp\.up_proj\.weight"):
        _ = lm.model.layers[0].mlp.up_proj.weight


class _Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.get, self.output = nn.Linear(4, 4), nn.Sequential(collections.OrderedDict(dense=nn.Linear(4, 4)))

    def forward(self, x):
        return self.output(self.get(x))


def test_modules_named_like_methods_and_points():
    """The error tells how they are reached, and so they are; the method works."""
    model, x = NNsight(_Named()), torch.ones(2, 4)
    with pytest.raises(AttributeError, match=r"model\.get\('get'\)"), model.trace(x):
        _ = model.get.output
    with pytest.raises(InvalidInput, match=r"model\.get\('output'\)"), model.trace(x):
        _ = model.output.dense.output
    with model.trace(x):
        found = [model.get("get").output.save(), model.get("output.dense").output.save()]
    expected = model.module.get(x)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], model.module.output(expected))


def test_cache_like_a_dictionary(model, net, x):
    """Paths and entries can be listed; a path that is not there is answered with near ones."""
    with model.trace(x) as tracer:
        cache = tracer.cache()
    assert [path for path, _ in cache.items()] == cache.keys()
    assert torch.equal(cache.values()[-1].output, net(x))
    with pytest.raises(KeyError, match="no module '7'; it has"):
        _ = cache["7"]


def test_a_stored_graph_needs_its_tensors(model, net, x):
    """Running it without them names the argument; with them it runs."""
    with model.trace(x) as tracer:
        out = (model.output + torch.ones(2)).save()
    stored = Graph.from_json(tracer.graph.to_json())
    with pytest.raises(InvalidInput, match="tensors="):
        model.run(stored)
    assert torch.equal(model.run(stored, tensors=tracer.graph.tensors)["out"], out)


def test_a_dtype_of_torch(tiny_llama):
    """It is the dtype of the loaded weights."""
    assert LanguageModel(str(tiny_llama), dtype=torch.bfloat16, dispatch=True).module.dtype is torch.bfloat16
