"""Graphs that read and set operations inside a module's forward, against functions patched in its place."""

import signal

import pytest
import torch
from torch import nn

from nnsight_hpc.execution import run_graph
from nnsight_hpc.graph import GraphBuilder, Ref, TensorRef
from nnsight_hpc.wire.errors import ExecutionFailed, InvalidGraph
from nnsight_hpc.wire.messages import ModelIdentity


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, times=3):
        h = x + 1
        for _ in range(times):
            h = torch.sin(self.linear(h))
        return helper(h)


def helper(h):
    return torch.mul(h, 2).abs()


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().requires_grad_(requires_grad=False)


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


class Graphs(GraphBuilder):
    def __init__(self):
        super().__init__()
        self.forward = Ref(self.add("model.forward", TensorRef("x")))

    def read(self, path, kind="output", **options):
        return Ref(self.add(f"model.{kind}", self.forward, path, **options))

    def run(self, module, **saves):
        named = {name: self.add("save", ref) for name, ref in saves.items()}
        return run_graph(self.build(named, ModelIdentity(id="net")), {"x": X}, module)


@pytest.fixture
def graph():
    return Graphs()


def by_hand(block, change=lambda _pass, value: value):
    """The forward written out; `change` replaces what `torch.sin` gives at a pass."""
    passes, h = [], X + 1
    for number in range(3):
        h = change(number, torch.sin(block.linear(h)))
        passes.append(h)
    return passes, torch.mul(h, 2).abs()


def test_reads_an_operation_at_each_of_its_calls(block, graph):
    """Of an operation in a loop, `call` says at which pass; an assignment has its value."""
    passes, output = by_hand(block)
    found = graph.run(
        nn.Sequential(block),
        first=graph.read("0:torch_sin_0"),
        third=graph.read("0:torch_sin_0", call=2),
        given=graph.read("0:torch_sin_0", "input", call=1),
        start=graph.read("0:h_0"),
        out=graph.read("0"),
    )
    assert torch.equal(found["first"], passes[0])
    assert torch.equal(found["third"], passes[2])
    assert torch.equal(found["given"], block.linear(passes[0]))
    assert torch.equal(found["start"], X + 1)
    assert torch.equal(found["out"], output)


def test_sets_an_operation_at_one_call(block, graph):
    """A set at the second pass changes what follows, as the same change by hand does."""
    value = graph.read("0:torch_sin_0", call=1)
    doubled = Ref(graph.add("operator.mul", value, 2))
    graph.add("model.set_output", graph.forward, "0:torch_sin_0", doubled, call=1)
    found = graph.run(nn.Sequential(block), out=graph.read("0"))
    _, expected = by_hand(block, lambda number, h: h * 2 if number == 1 else h)
    assert torch.equal(found["out"], expected)


def test_reads_and_sets_nested_operations_of_the_whole_model(block, graph):
    """The model's own forward has an empty path; what an operation of it calls has operations, too."""
    graph.add("model.set_input", graph.forward, ":helper_0:torch_mul_0", TensorRef("x"))
    inputs = graph.read(":helper_0:abs_0", "inputs")
    found = graph.run(block, out=graph.read(""), inputs=inputs)
    assert torch.equal(found["out"], (X * 2).abs())
    assert [list(part) for part in found["inputs"]] == [[], []]


def test_skips_an_operation(block, graph):
    """A skipped operation does not run and has the value given."""
    ran = []
    block.linear.register_forward_hook(lambda *_: ran.append(1))
    for call in range(3):
        graph.add("model.skip", graph.forward, ":self_linear_0", TensorRef("x"), call=call)
    assert torch.equal(graph.run(block, out=graph.read(""))["out"], torch.mul(torch.sin(X), 2).abs())
    assert ran == []


def test_forward_ends_after_the_last_operation_that_is_needed(block, graph):
    """What the forward would do after the operation is not run."""
    ran = []
    block.linear.register_forward_hook(lambda *_: ran.append(1))
    graph.run(block, first=graph.read(":torch_sin_0"))
    assert ran == [1]
    assert "forward" not in vars(block)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("0:torch_sin_1", r"no operation 'torch_sin_1'[\s\S]*mean torch_sin_0\?"),
        ("0:helper_0:torch_mul_1", r"helper has no operation 'torch_mul_1'[\s\S]*mean torch_mul_0\?"),
        ("0:self_linear_0:F_linear_0", "calls a module, Linear"),
        ("1:input_abs_0", "forward has no operation 'input_abs_0'"),
    ],
)
def test_operation_that_is_not_there_is_refused_before_the_model_runs(block, graph, path, message):
    """The error names what is near, and nothing of the model has run."""
    ran = []
    block.linear.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(InvalidGraph, match=message):
        graph.run(nn.Sequential(block, nn.Identity()), found=graph.read(path))
    assert ran == []


def test_operation_that_never_runs_is_an_error(block, graph):
    """A call that the loop does not come to is said to be missing."""
    with pytest.raises(InvalidGraph, match=r"did not reach :torch_sin_0"):
        graph.run(block, late=graph.read(":torch_sin_0", call=7))
    assert "forward" not in vars(block)


def test_string_cannot_be_set_at_an_operation(block, graph):
    """What chooses the code that runs is not for a graph to set."""
    graph.add("model.set_input", graph.forward, ":torch_sin_0", "text")
    with pytest.raises(InvalidGraph, match="a str cannot be set at the operation torch_sin_0"):
        graph.run(block, out=graph.read(""))


def test_nothing_stays_after_an_error_or_an_interruption(block, graph):
    """The module has its own forward back when an operation of the graph fails, or the program is interrupted."""
    bad = Ref(graph.add("Tensor.view", graph.read(":torch_sin_0"), 7, 7))
    with pytest.raises(ExecutionFailed):
        graph.run(block, bad=bad)
    assert "forward" not in vars(block)
    block.linear.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    second = Graphs()
    with pytest.raises(KeyboardInterrupt):
        second.run(block, value=second.read(":torch_sin_0"))
    assert "forward" not in vars(block)
