"""What a graph touches of the model: every operation has a decision, and each way to write a trace comes out as what it is."""

import pytest
import torch
from torch import nn

from nnsight_hpc import NNsight
from nnsight_hpc.graph import GraphBuilder, Ref, TensorRef
from nnsight_hpc.graph.access import DECISIONS, accesses
from nnsight_hpc.graph.operations import ALLOWED, IN_PLACE, LOCAL_ONLY, PROTOCOL
from nnsight_hpc.graph.points import AT_A_MODULE
from nnsight_hpc.wire.errors import InvalidGraph
from nnsight_hpc.wire.messages import ModelIdentity


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        hidden = torch.relu(self.up(x))
        return self.down(hidden)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = Block(), Block(), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.b(self.a(x)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return NNsight(Net().eval().requires_grad_(requires_grad=False))


X = torch.ones(2, 4)


def needs(graph):
    """The rights that a graph needs, each with its module."""
    return {(access.right, module) for access in accesses(graph) for module in access.modules}


def traced(net, block, *inputs):
    with net.trace(*(inputs or (X,))) as tracer:
        block(net, tracer)
    return needs(tracer.graph)


# -- no operation is overlooked -----------------------------------------------------------------------------------------


def test_every_operation_of_the_protocol_has_a_decision():
    """An operation that is new in the protocol fails here until `access.py` says what it needs."""
    assert set(DECISIONS) == PROTOCOL - LOCAL_ONLY


def test_every_operation_that_execution_knows_at_a_point_needs_something():
    """What stands at a point of the model is never decided to be nothing."""
    builder = GraphBuilder()
    forward = Ref(builder.add("model.forward", TensorRef("x")))
    for op in sorted(AT_A_MODULE):
        more = () if op == "model.result" else ("a",) if op in READING else ("a", TensorRef("x"))
        builder.add(op, forward, *more)
    graph = builder.build({}, ModelIdentity(id="m"))
    assert {access.node.op for access in accesses(graph) if access.modules} == AT_A_MODULE


READING = {"model.output", "model.input", "model.inputs"}


def test_every_change_in_place_of_what_was_read_is_a_change_of_the_module():
    """What writes its first argument sets the module that this was read from; `requires_grad_` writes no element."""
    for op in sorted(IN_PLACE):
        builder = GraphBuilder()
        value = builder.add("model.output", Ref(builder.add("model.forward", TensorRef("x"))), "a")
        builder.add(op, Ref(value), *(0, 0) if op == "operator.setitem" else (0,))
        expected = set() if op == "Tensor.requires_grad_" else {("set", "a")}
        assert needs(builder.build({}, ModelIdentity(id="m"))) - {("read", "a")} == expected, op


def test_an_operation_without_decision_is_refused(monkeypatch):
    """What nobody has decided is no access for free."""
    monkeypatch.delitem(DECISIONS, "model.skip")
    builder = GraphBuilder()
    builder.add("model.skip", Ref(builder.add("model.forward", TensorRef("x"))), "a", 0)
    with pytest.raises(InvalidGraph, match=r"nobody has decided what model\.skip needs"):
        list(accesses(builder.build({}, ModelIdentity(id="m"))))


def test_a_value_computed_from_what_was_read_is_the_users_own():
    """No operation but views makes a value that is the model's memory: to change it needs nothing."""
    builder = GraphBuilder()
    value = Ref(builder.add("model.output", Ref(builder.add("model.forward", TensorRef("x"))), "a"))
    builder.add("Tensor.zero_", Ref(builder.add("torch.relu", value)))
    builder.add("Tensor.zero_", Ref(builder.add("Tensor.clone", value)))
    assert needs(builder.build({}, ModelIdentity(id="m"))) == {("read", "a")}


# -- as people write it -------------------------------------------------------------------------------------------------


def _save(value):
    value.save()


def _assign(envoy, point, value):
    setattr(envoy, point, value)


def _change(value):
    value[:] = 0


def _add_in_place(value):
    value += 1
    value.save()


def _listed(net):
    values = [net.a.output, torch.zeros(1)]
    for value in values:
        value[:] = 0


def _gradient(net, *, change):
    hidden = net.a.output
    if change:
        hidden.grad = torch.zeros(2, 4)
    else:
        hidden.grad.save()
    net.head.output.sum().backward()


def _gradient_in_place(net):
    net.a.output.grad[:] = 0
    net.head.output.sum().backward()


def _gradient_of_what_was_set(net):
    own = torch.zeros(2, 4, requires_grad=True)
    net.b.up.input = own
    net.b.up.input.grad.save()
    net.head.output.sum().backward()


R, S, P = "read", "set", "parameters"
WAYS = {
    "output": (lambda n, _: _save(n.a.output), {(R, "a")}),
    "input": (lambda n, _: _save(n.b.up.input), {(R, "b.up")}),
    "inputs": (lambda n, _: _save(n.a.inputs[0]), {(R, "a")}),
    "output of the whole model": (lambda n, _: _save(n.output), {(R, "")}),
    "result": (lambda _, t: _save(t.result), {(R, "")}),
    "set output": (lambda n, _: _assign(n.a, "output", torch.zeros(2, 4)), {(S, "a")}),
    "set input": (lambda n, _: _assign(n.a, "input", torch.zeros(2, 4)), {(S, "a")}),
    "set inputs": (lambda n, _: _assign(n.a, "inputs", ((torch.zeros(2, 4),), {})), {(S, "a")}),
    "skip": (lambda n, _: n.a.skip(torch.zeros(2, 4)), {(S, "a")}),
    "in place": (lambda n, _: _change(n.a.output), {(R, "a"), (S, "a")}),
    "in place through views": (lambda n, _: n.a.output[0].view(-1).mul_(0), {(R, "a"), (S, "a")}),
    "in place of an input": (lambda n, _: _change(n.b.inputs[0][0]), {(R, "b"), (S, "b")}),
    "augmented": (lambda n, _: _add_in_place(n.a.output), {(R, "a"), (S, "a")}),
    "in place of a copy": (lambda n, _: _change(n.a.output.clone()), {(R, "a")}),
    "in place in a loop": (lambda n, _: _listed(n), {(R, "a"), (S, "a")}),
    "gradients asked for": (lambda n, _: n.a.output.requires_grad_(), {(R, "a")}),
    "parameter": (lambda n, _: _save(n.a.up.weight), {(P, ""), (R, "a.up")}),
    "all parameters": (lambda n, _: _save(next(iter(n.head.parameters()))), {(P, ""), (R, "head")}),
    "call": (lambda n, _: _save(n.head(n.a.output)), {(R, "a"), (R, "head"), (S, "head")}),
    "inside a forward": (lambda n, _: _save(n.a.source.torch_relu_0.output), {(R, "a"), (P, "")}),
    "set inside a forward": (lambda n, _: _assign(n.a.source.torch_relu_0, "output", torch.zeros(2, 8)), {(S, "a")}),
    "gradient": (lambda n, _: _gradient(n, change=False), {(R, "a"), (R, "head")}),
    "set gradient": (lambda n, _: _gradient(n, change=True), {(R, "a"), (S, "a"), (R, "head")}),
    "gradient in place": (lambda n, _: _gradient_in_place(n), {(R, "a"), (S, "a"), (R, "head")}),
    "gradient of what was set": (lambda n, _: _gradient_of_what_was_set(n), {(R, "b.up"), (S, "b.up"), (R, "head")}),
    "log": (lambda n, t: t.log(n.a.output.sum()), {(R, "a")}),
    "list on the worker": (lambda n, t: t.list().append(n.a.output), {(R, "a")}),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_write_a_trace_needs_what_it_does(net, way):
    """Reads, sets, changes in place, calls, parameters, gradients, and what is inside of forwards."""
    block, expected = WAYS[way]
    assert traced(net, block) == expected


def test_what_is_in_branches_and_loops_counts(net):
    """Both branches, the body of a loop, what goes from pass to pass, and what a loop hands out."""
    with net.trace(X) as tracer:
        value = net.a.output
        if value.sum() > 0:
            value[:] = 0
        else:
            net.b.skip(value)
    assert needs(tracer.graph) == {("read", "a"), ("set", "a"), ("set", "b")}
    with net.trace(X) as tracer:
        value = net.a.output
        for row in value:
            row[0] = 1
    assert needs(tracer.graph) == {("read", "a"), ("set", "a")}
    with net.trace(X) as tracer:
        last = total = net.b.output
        for factor in net.a.output.sum(0):
            last = last.view(-1)
            total = total * factor
        last.mul_(2)
        total.mul_(2)
    assert needs(tracer.graph) == {("read", "a"), ("read", "b"), ("set", "b")}
    with net.trace(X) as tracer:
        total = net.b.output
        for factor in net.a.output.sum(0):
            total = total * factor
        total.mul_(2)
    assert needs(tracer.graph) == {
        ("read", "a"),
        ("read", "b"),
        ("set", "b"),
    }  # without a pass it is still the module's


def test_invokes_sessions_edits_and_caches_are_what_is_in_them(net):
    """Nothing that is around a read or set hides it."""
    with net.trace() as tracer:
        with tracer.invoke(X):
            net.a.output.save()
        with tracer.invoke(X):
            net.b.output[:] = 0
    assert needs(tracer.graph) == {("read", "a"), ("read", "b"), ("set", "b")}
    with net.session() as session:
        with net.trace(X):
            value = net.a.output
        with net.trace(X):
            net.b.output = value
    assert needs(session.graph) == {("read", "a"), ("set", "b")}
    with net.edit() as edited:
        edited.a.output = torch.zeros(2, 4)
    with edited.trace(X) as tracer:
        edited.head.output.save()
    assert needs(tracer.graph) == {("set", "a"), ("read", "head")}
    with net.trace(X) as tracer:
        tracer.cache(modules=[net.a, net.b.up])
    assert needs(tracer.graph) == {("read", "a"), ("read", "b.up")}


def test_memory_that_two_modules_have_is_changed_at_both():
    """A value that was read at one module and set at another is the memory of both."""
    builder = GraphBuilder()
    forward = Ref(builder.add("model.forward", TensorRef("x")))
    value = Ref(builder.add("model.output", forward, "a"))
    builder.add("model.set_input", forward, "b", value)
    builder.add("Tensor.zero_", Ref(builder.add("model.input", forward, "b")))
    graph = builder.build({}, ModelIdentity(id="m"))
    assert needs(graph) == {("read", "a"), ("read", "b"), ("set", "b"), ("set", "a")}


def test_what_a_list_or_dict_holds_is_changed_through_it():
    """An entry of a container of the user's own is still the model's memory; to put another in its place changes the list."""
    builder = GraphBuilder()
    forward = Ref(builder.add("model.forward", TensorRef("x")))
    a, b, c = (Ref(builder.add("model.output", forward, name)) for name in "abc")
    held = Ref(builder.add("container.dict", one=Ref(builder.add("container.list", a)), two=b))
    listed = Ref(builder.add("container.append", Ref(builder.add("container.list")), c))
    builder.add("operator.setitem", held, "two", 0)
    reads = {("read", "a"), ("read", "b"), ("read", "c")}
    assert needs(builder.build({}, ModelIdentity(id="m"))) == reads
    inner = Ref(builder.add("operator.getitem", Ref(builder.add("operator.getitem", held, "one")), 0))
    builder.add("Tensor.zero_", inner)
    assert needs(builder.build({}, ModelIdentity(id="m"))) == {
        *reads,
        ("set", "a"),
        ("set", "b"),
    }  # which entry is not told
    builder.add("Tensor.zero_", Ref(builder.add("operator.getitem", listed, 0)))
    assert needs(builder.build({}, ModelIdentity(id="m"))) == {*reads, ("set", "a"), ("set", "b"), ("set", "c")}


def test_a_gradient_set_to_itself_is_seen_through():
    """A gradient whose value is set to the gradient itself names its module, and the search for it ends."""
    builder = GraphBuilder()
    forward = Ref(builder.add("model.forward", TensorRef("x")))
    value = Ref(builder.add("model.output", forward, "a"))
    gradient = Ref(builder.add("grad.read", value))
    builder.add("grad.set", gradient, gradient)
    builder.add("grad.backward", Ref(builder.add("Tensor.sum", value)))
    assert needs(builder.build({}, ModelIdentity(id="m"))) == {("read", "a"), ("set", "a")}


@pytest.mark.parametrize(
    ("options", "expected"), [({}, set()), ({"return_dict_in_generate": True}, {("read", "")})], ids=["tokens", "all"]
)
def test_tokens_of_a_generation_are_the_answer_and_no_read(options, expected):
    """What a generation answers with needs nothing; scores and whatever else it may return are the whole model's output."""
    builder = GraphBuilder()
    forward = Ref(builder.add("model.generate", input_ids=TensorRef("x"), max_new_tokens=3, **options))
    rows = Ref(builder.add("model.invoke", forward, 0, 1))
    for where in (forward, rows):
        builder.add("save", Ref(builder.add("model.result", where)))
    assert needs(builder.build({}, ModelIdentity(id="m"))) == expected


def test_a_step_of_a_generation_is_a_read_of_its_module():
    """Later calls of a module are reads of it, too."""
    builder = GraphBuilder()
    forward = Ref(builder.add("model.generate", input_ids=TensorRef("x"), max_new_tokens=3))
    builder.add("save", Ref(builder.add("model.output", forward, "lm_head", call=2, optional=True)))
    assert needs(builder.build({}, ModelIdentity(id="m"))) == {("read", "lm_head")}


def test_parameters_are_found_however_their_path_is_divided():
    """The module of a parameter is what stands before its last name, wherever the graph cuts the path."""
    for args in (("a.up", "weight"), ("a", "up.weight"), ("", "a.up.weight"), ("a.up.weight", "")):
        builder = GraphBuilder()
        builder.add("model.parameter", *args)
        assert needs(builder.build({}, ModelIdentity(id="m"))) == {("parameters", ""), ("read", "a.up")}


def test_operations_that_touch_no_model_are_all_the_others():
    """What is neither of the protocol nor in place computes new values or views: it touches nothing."""
    builder = GraphBuilder()
    for op in sorted(ALLOWED - PROTOCOL - IN_PLACE):
        builder.add(op, TensorRef("x"))
    assert needs(builder.build({}, ModelIdentity(id="m"))) == set()
