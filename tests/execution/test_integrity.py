"""What a review found: state that the model keeps beside its weights, operations that never come back, bare errors."""

import pytest
import torch
from torch import nn

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.values import Absent
from nnsight_hpc.graph import Graph, Ref
from nnsight_hpc.graph.build import APPEND, END, IF, ITEM, LOOP, RANGE, SAVE
from nnsight_hpc.graph.nodes import TensorRef
from nnsight_hpc.wire.errors import InvalidGraph


class Remembers(nn.Module):
    """A module with a list, and a tensor that is no buffer, which its forward uses."""

    def __init__(self):
        super().__init__()
        self.sizes, self.plain = [1, 2], torch.zeros(3)

    def forward(self, value):
        sizes = self.sizes
        plain = self.plain
        return value * sum(sizes) + plain.sum()


def test_list_of_the_model_is_not_changed(x, builder):
    """What is read inside of a forward is a list of the graph's own."""
    model = Remembers()
    builder.add(APPEND, Ref(builder.add("model.output", Ref(0), ":sizes_0")), 7)
    save = builder.add(SAVE, Ref(builder.add("model.output", Ref(0), "")))
    got = run_graph(builder.graph(s=save), {"x": x}, model)
    assert torch.equal(got["s"], x * 3)
    assert model.sizes == [1, 2]


def test_tensor_that_is_no_buffer_is_not_changed(x, builder):
    """A tensor that a module holds as a plain attribute is the model's, too."""
    model = Remembers()
    builder.add("Tensor.add_", Ref(builder.add("model.output", Ref(0), ":plain_0")), 1.0)
    builder.add(SAVE, Ref(builder.add("model.output", Ref(0), "")))
    with pytest.raises(InvalidGraph, match="would change a parameter"):
        run_graph(builder.graph(), {"x": x}, model)
    assert torch.equal(model.plain, torch.zeros(3))


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (("torch.div", TensorRef("i"), -1), "by -1"),
        (("Tensor.divide", TensorRef("i"), -1), "by -1"),
        (("torch.matrix_power", TensorRef("x"), -(2**62)), "exponent"),
    ],
)
def test_operation_that_would_end_or_hold_the_process_is_refused(net, x, builder, node, words):
    """A division that traps and a power that takes for ever raise an error instead."""
    options = {"rounding_mode": "trunc"} if "div" in node[0] else {}
    builder.add(SAVE, Ref(builder.add(*node, **options)))
    with pytest.raises(Exception, match=words):
        run_graph(builder.graph(), {"x": x, "i": torch.tensor([-(2**63)])}, net)


def test_save_in_a_loop_of_a_block_that_is_not_run(net, x, builder):
    """It is absent."""
    choice = builder.add(IF, False)
    loop = builder.add(LOOP, Ref(builder.add(RANGE, 2, block=choice)), block=choice)
    save = builder.add(SAVE, Ref(builder.add(ITEM, Ref(loop), block=loop)), block=loop)
    builder.add(END, Ref(loop), block=choice)
    assert isinstance(run_graph(builder.graph(s=save), {"x": x}, net)["s"], Absent)


@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_huge_complex_number_is_refused(number):
    """An integer beyond the range of a double in a complex number is named."""
    document = (
        '{"format":"nnsight-hpc/graph","version":1,"model":{"id":""},"kind":"trace","saves":{},'
        f'"nodes":[{{"id":0,"op":"torch.add","args":[{{"complex":[{number},0]}},1]}}]}}'
    )
    with pytest.raises(InvalidGraph):
        Graph.from_json(document)
