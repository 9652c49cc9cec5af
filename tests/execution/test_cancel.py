"""A cancel reaches a run between two layers of the model, wherever the graph looks, if it looks anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nnsight_hpc.execution import run_graph
from nnsight_hpc.graph import GraphBuilder, Ref, TensorRef
from nnsight_hpc.graph.build import FORWARD, GENERATE, READS, RESULT, SAVE
from nnsight_hpc.wire.errors import RequestCancelled
from nnsight_hpc.wire.messages import ModelIdentity
from tests.oracle.architectures import make

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.graph import Graph


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.fixture
def ran(llama) -> Iterator[list[str]]:
    """The layers that have run, in their order."""
    names: list[str] = []
    layers = dict(llama.module.model.layers.named_children())
    handles = [layer.register_forward_hook(lambda *_, name=name: names.append(name)) for name, layer in layers.items()]
    yield names
    for handle in handles:
        handle.remove()


def of_a_forward() -> Graph:
    """What the model itself gives, and no point in it."""
    builder = GraphBuilder()
    forward = builder.append(FORWARD, (), {"input_ids": TensorRef("ids")}, None)
    return _saving(builder, builder.add(RESULT, Ref(forward)))


def of_the_last_layer() -> Graph:
    builder = GraphBuilder()
    forward = builder.append(FORWARD, (), {"input_ids": TensorRef("ids")}, None)
    return _saving(builder, builder.add(READS["output"], Ref(forward), "lm_head"))


def of_a_generation() -> Graph:
    builder = GraphBuilder()
    length = {"max_new_tokens": 5, "min_new_tokens": 5}
    forward = builder.append(GENERATE, (), {"input_ids": TensorRef("ids"), **length}, None)
    return _saving(builder, builder.add(RESULT, Ref(forward)))


def _saving(builder: GraphBuilder, value: int) -> Graph:
    return builder.build({"value": builder.add(SAVE, Ref(value))}, ModelIdentity(id="m"))


@pytest.mark.parametrize("program", [of_a_forward, of_the_last_layer, of_a_generation])
def test_no_layer_begins_after_a_cancel(llama, ran, program):
    """The one that runs is the last."""
    graph, tensors = program(), {"ids": llama.inputs()}
    run_graph(graph, tensors, llama.module, cancelled=lambda: False)
    whole = list(ran)
    assert len(whole) == len(llama.module.model.layers) * (5 if program is of_a_generation else 1)
    for layers in range(len(whole)):
        ran.clear()
        with pytest.raises(RequestCancelled):
            run_graph(graph, tensors, llama.module, cancelled=lambda layers=layers: len(ran) >= layers)
        assert ran == whole[:layers]
