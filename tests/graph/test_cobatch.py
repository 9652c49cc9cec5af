"""Which requests may share a forward."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nnsight_hpc.graph import Graph, capture_graph
from nnsight_hpc.graph.build import GraphBuilder
from nnsight_hpc.graph.cobatch import batch_key
from nnsight_hpc.graph.nodes import Ref, TensorRef
from nnsight_hpc.wire.messages import ModelIdentity

MODEL = ModelIdentity(id="some/model", fingerprint="f" * 8)
NAMES = ("input_ids", "attention_mask", "position_ids")


def shapes(rows: int, length: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return dict.fromkeys(NAMES, ("I64", (rows, length)))


def with_nodes(*nodes: tuple[str, tuple[object, ...]], **of_forward: object) -> Graph:
    """One forward over the usual tensors, and nodes after it that refer to it by 0."""
    builder = GraphBuilder()
    given = {name: TensorRef(name) for name in NAMES} | {"use_cache": False} | of_forward
    builder.append("model.forward", (), given, None)
    for op, args in nodes:
        builder.append(op, args, {}, None)
    return builder.build({}, MODEL)


def key_of(graph: Graph, rows: int = 1, length: int = 7) -> str | None:
    found = batch_key(graph, shapes(rows, length), exclusive=False)
    return found and found.key


def test_prompts_of_one_length_share_whatever_is_saved():
    """Requests for one model with prompts of one length have one key, however many rows and whichever points they have."""
    first = key_of(capture_graph({"a": "model.layers.0.output"}, MODEL))
    other = key_of(capture_graph({"b": "lm_head.output"}, MODEL), rows=3)
    assert first is not None
    assert other == first


def test_rows_and_tokens_are_counted():
    """The key says how many prompts and how many tokens there are."""
    found = batch_key(with_nodes(), shapes(3, 7), exclusive=False)
    assert found is not None
    assert (found.rows, found.tokens) == (3, 21)


def test_other_lengths_models_and_settings_do_not_share():
    """Another length, model or setting of the model's call gives another key."""
    graph = with_nodes()
    other_model = replace(graph, model=ModelIdentity(id="some/model", fingerprint="g" * 8))
    other_setting = with_nodes(output_hidden_states=True)
    keys = [key_of(graph), key_of(graph, length=8), key_of(other_model), key_of(other_setting)]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_who_wants_to_be_alone_is():
    """A request that is to run alone has no key."""
    assert batch_key(with_nodes(), shapes(1, 7), exclusive=True) is None


@pytest.mark.parametrize(
    "graph",
    [
        pytest.param(with_nodes(("model.forward", ())), id="two forwards"),
        pytest.param(with_nodes(("model.skip", (Ref(0), "model.layers.0", 1))), id="a skipped module"),
        pytest.param(with_nodes(("model.inputs", (Ref(0), "model.layers.0"))), id="all arguments of a module"),
        pytest.param(with_nodes(("model.output", (Ref(0), "model.layers.0:add_0"))), id="inside of a forward"),
        pytest.param(with_nodes(("model.output", (Ref(0), "lm_head")), ("grad.backward", (Ref(1),))), id="gradients"),
        pytest.param(with_nodes(labels=TensorRef("input_ids")), id="labels, whose loss is of all prompts"),
        pytest.param(with_nodes(past_key_values=[1]), id="an argument that nobody knows"),
        pytest.param(with_nodes(input_ids=TensorRef("unknown")), id="a tensor that is not there"),
    ],
)
def test_what_cannot_share_has_no_key(graph: Graph):
    """A graph of which it is not certain that each row stands for itself has no key."""
    assert key_of(graph) is None


def test_a_generation_has_no_key():
    """A generation runs alone."""
    builder = GraphBuilder()
    builder.append("model.generate", (), {"input_ids": TensorRef("input_ids"), "max_new_tokens": 2}, None)
    assert key_of(builder.build({}, MODEL)) is None


def test_tensors_of_unequal_rows_have_no_key():
    """A mask for other rows than the prompts have leaves open whose is whose."""
    odd = shapes(2, 7) | {"attention_mask": ("I64", (1, 7))}
    assert batch_key(with_nodes(), odd, exclusive=False) is None
