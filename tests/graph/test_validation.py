import pytest

from nnsight_hpc.graph import DType, GraphBuilder, Ref, TensorRef, validate
from nnsight_hpc.graph.nodes import Graph, Node
from nnsight_hpc.graph.operations import ALLOWED
from nnsight_hpc.wire.errors import InvalidGraph
from nnsight_hpc.wire.messages import ModelIdentity

FORWARD = Node(0, "model.forward", (TensorRef("x"),))


def _with(*nodes, saves=None, kind="trace"):
    return Graph((FORWARD, *nodes), saves or {}, ModelIdentity(id="m"), kind)


def test_plain_graph_is_taken():
    """Reading a point, computing on it and saving is a valid graph."""
    builder = GraphBuilder()
    forward = builder.add("model.forward", TensorRef("x"))
    value = builder.add("model.output", Ref(forward), "layers.3", call=0)
    total = builder.add("torch.sum", Ref(value), dim=-1, dtype=DType("float32"))
    validate(builder.build({"total": builder.add("save", Ref(total))}, ModelIdentity(id="m")))


REFUSED = {
    "file": Node(1, "torch.load", ("/etc/passwd",)),
    "code": Node(1, "builtins.eval", ("1",)),
    "process": Node(1, "os.system", ("id",)),
    "pointer": Node(1, "Tensor.data_ptr", (Ref(0),)),
    "storage": Node(1, "Tensor.untyped_storage", (Ref(0),)),
    "numpy": Node(1, "Tensor.numpy", (Ref(0),)),
    "callback": Node(1, "Tensor.apply_", (Ref(0),)),
    "hook": Node(1, "Tensor.register_hook", (Ref(0),)),
    "seed": Node(1, "torch.manual_seed", (1,)),
    "threads": Node(1, "torch.set_num_threads", (1,)),
    "unseeded": Node(1, "torch.randn", (1,)),
    "dunder method": Node(1, "Tensor.__reduce__", (Ref(0),)),
    "private attribute": Node(1, "attribute", (Ref(0), "__class__")),
    "attribute chain": Node(1, "attribute", (Ref(0), "a.b")),
    "out": Node(1, "torch.add", (1, 2), {"out": 3}),
    "in place by position": Node(1, "torch.nn.functional.relu", (TensorRef("x"), True)),
    "out by position": Node(1, "torch.norm", (TensorRef("x"), 2, None, False, TensorRef("y"))),
    "running statistics": Node(1, "torch.nn.functional.batch_norm", (TensorRef("x"),), {"training": True}),
    "renormalised weight": Node(1, "torch.nn.functional.embedding", (1, 2), {"max_norm": 1.0}),
    "target by keyword": Node(1, "Tensor.zero_", (), {"value": TensorRef("x")}),
    "change of a constant": Node(1, "Tensor.zero_", (TensorRef("x"),)),
    "random numbers": Node(1, "torch.nn.functional.scaled_dot_product_attention", (1, 2, 3), {"dropout_p": 0.5}),
    "uninitialised memory": Node(1, "torch.empty_like", (TensorRef("x"),)),
    "forward as a value": Node(1, "torch.sum", (Ref(0),)),
    "forward set as a value": Node(1, "model.set_output", (Ref(0), "layers.0", Ref(0))),
    "keyword": Node(1, "torch.add", (1, 2), {"__class__": 3}),
    "itself": Node(1, "torch.add", (Ref(1), 2)),
    "later": Node(1, "torch.add", (Ref(7), 2)),
    "before all": Node(1, "torch.add", (Ref(-1), 2)),
    "id": Node(5, "torch.add", (1, 2)),
    "module path": Node(1, "model.output", (Ref(0), "layers.0; import os")),
    "module dunder": Node(1, "model.output", (Ref(0), "a..b")),
    "no forward": Node(1, "model.output", (3, "layers.0")),
    "set without value": Node(1, "model.set_output", (Ref(0), "layers.0")),
    "call keyword": Node(1, "model.output", (Ref(0), "layers.0"), {"call": -1}),
    "save of a constant": Node(1, "save", (3,)),
    "setitem of a constant": Node(1, "operator.setitem", (TensorRef("x"), 0, 1)),
    "dtype": Node(1, "torch.zeros", (3,), {"dtype": DType("qint8")}),
    "tensor name": Node(1, "torch.add", (TensorRef("../../etc"), 1)),
    "parameter": Node(1, "model.parameter", ("layers.0",)),
}


@pytest.mark.parametrize("node", REFUSED.values(), ids=REFUSED.keys())
def test_node_is_refused_and_named(node):
    """A node that is not allowed is refused, and the message names its operation."""
    with pytest.raises(InvalidGraph) as caught:
        validate(_with(node))
    assert node.op in str(caught.value)


def test_all_problems_are_shown_at_once():
    """Two problems of one graph are both in the message."""
    with pytest.raises(InvalidGraph) as caught:
        validate(_with(Node(1, "torch.load", ("a",)), Node(2, "torch.seed", ())))
    assert "torch.load" in str(caught.value)
    assert "torch.seed" in str(caught.value)


def test_save_must_name_a_save():
    """A name in `saves` that points at another node is refused."""
    with pytest.raises(InvalidGraph, match="'a' names node 0"):
        validate(_with(saves={"a": 0}))


def test_unknown_kind_is_refused():
    """A kind of document that this version does not know is not guessed at."""
    with pytest.raises(InvalidGraph, match="kind"):
        validate(_with(kind="generate"))


def test_too_many_forwards_are_refused():
    """More forwards than the limit are refused with both numbers."""
    nodes = tuple(Node(i, "model.forward") for i in range(10_001))
    with pytest.raises(InvalidGraph, match=r"10001 forward passes; the limit is 10000"):
        validate(Graph(nodes))


def test_no_allowed_name_is_private():
    """Nothing with a leading underscore is on the list."""
    assert not [op for op in ALLOWED if op.rpartition(".")[2].startswith("_")]
