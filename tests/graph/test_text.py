"""The text of a graph reads like the program that it was recorded from."""

import ast
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.graph import Graph, GraphBuilder, Ref, Seed, TensorRef
from nnsight_hpc.graph.nodes import Node, Source
from nnsight_hpc.graph.operations import PROTOCOL
from nnsight_hpc.wire.messages import ModelIdentity

MODEL = ModelIdentity(id="tiny")


class Program:
    """Records nodes for lines of a program, as a trace does."""

    def __init__(self):
        self.builder, self.saves, self.line, self.text, self.block = GraphBuilder(), {}, 0, "", None

    def at(self, text):
        self.line, self.text = self.line + 1, text
        return self

    def __call__(self, op, *args, **kwargs):
        source = Source("experiment.py", self.line, self.text)
        return Ref(self.builder.append(op, args, kwargs, source, self.block))

    def save(self, value, name):
        self.saves[name] = self("save", value).id

    def lines(self, *, comments=False):
        text = str(self.builder.build(self.saves, MODEL))
        return [line if comments else line.partition("  #")[0].rstrip() for line in text.splitlines()[1:]]


@pytest.fixture
def program():
    program = Program()
    program.at("with model.trace(x):")
    program.forward = program("model.forward", TensorRef("t0"))
    return program


def _read(program, path="model.layers.3", kind="output", **kwargs):
    return program(f"model.{kind}", program.forward, path, **kwargs)


def test_a_save_is_part_of_its_assignment(program):
    """A read that is saved is one line with the module's path, the user's name and the user's line."""
    program.at("h = model.layers[3].output.save()")
    program.save(_read(program), "h")
    assert program.lines(comments=True) == [
        f"{'with root.trace(<t0>):':<60}  # experiment.py:1",
        f"{'    h = model.layers[3].output.save()':<60}  # experiment.py:2",
    ]


def test_one_line_of_the_program_is_one_line(program):
    """What one line computes is written as one expression, with the parentheses that Python needs."""
    program.at("y = (model.layers[3].output + 1) * -2")
    total = program("operator.add", _read(program), 1)
    product = program("operator.mul", total, -2)
    program.at("z = y ** 2").save(program("operator.pow", product, 2), "z")
    assert program.lines()[1:] == ["    y = (model.layers[3].output + 1) * -2", "    z = (y ** 2).save()"]


def test_names_come_from_assignments(program):
    """A value that the program gives a name to has it where it is used, also without a save."""
    h = program.at("h = model.layers[3].output") and _read(program)
    program.at("model.layers[4].output[:, -1] = h[:, -1] * 2")
    last = program("operator.getitem", h, (slice(None), -1))
    twice = program("operator.mul", last, 2)
    program("operator.setitem", _read(program, "model.layers.4"), (slice(None), -1), twice)
    assert program.lines()[1:] == [
        "    h = model.layers[3].output",
        "    model.layers[4].output[:, -1] = h[:, -1] * 2",
    ]


def test_a_name_is_used_again_only_when_it_is_free(program):
    """A second value of one name gets another name while the first is still needed, and the same one otherwise."""
    first = program.at("h = model.layers[3].output") and _read(program)
    second = program.at("h = torch.relu(h)")("torch.relu", first)
    third = program.at("h = torch.relu(h)")("torch.relu", second)
    program.at("z = g + h").save(program("operator.add", second, third), "z")
    assert program.lines()[1:] == [
        "    h = model.layers[3].output",
        "    h = torch.relu(h)",
        "    h_2 = torch.relu(h)",
        "    z = (h + h_2).save()",
    ]


def test_repeated_line_is_repeated(program):
    """A line that ran three times is three lines."""
    h = _read(program)
    for _ in range(3):
        program.text = "h = torch.relu(h * 0.5)"
        h = program("torch.relu", program("operator.mul", h, 0.5))
    lines = program.lines()[1:]
    assert lines == ["    h = torch.relu(model.layers[3].output * 0.5)", *["    h = torch.relu(h * 0.5)"] * 2]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (lambda p: p("model.set_output", p.forward, "lm_head", 0), "lm_head.output = 0"),
        (lambda p: p("model.skip", p.forward, "model.layers.1", TensorRef("t1")), "model.layers[1].skip(<t1>)"),
        (lambda p: p("operator.imul", _read(p, "0.a b.c"), 2), "root[0].get('a b').c.output *= 2"),
        (lambda p: p("Tensor.mul_", _read(p, "", call=2), 2), "root.calls[2].output.mul_(2)"),
        (lambda p: p("grad.set", _read(p), 1), "model.layers[3].output.grad = 1"),
        (lambda p: p("grad.backward", _read(p), retain_graph=False), "model.layers[3].output.backward()"),
        (lambda p: p("log", "norm", _read(p, kind="input")), "print('norm', model.layers[3].input)"),
        (lambda p: p("container.append", p("container.list"), 1), "[].append(1)"),
        (lambda p: p("torch.randn", 3, generator=Seed(7)), "v2 = torch.randn(3, generator=seed(7))"),
        (lambda p: p("model.call", "lm_head", _read(p)), "v3 = lm_head(model.layers[3].output)"),
        (lambda p: p("model.parameter", "lm_head", "weight"), "v2 = lm_head.weight"),
        (lambda p: p("model.result", p.forward), "v2 = result"),
        (lambda p: p("local.apply", 0, _read(p)), "v3 = apply(0, model.layers[3].output)"),
        (lambda p: p("attribute", _read(p), "shape"), "v3 = model.layers[3].output.shape"),
        (
            lambda p: p("model.output", p.forward, "model.a:attn_0:linear_1"),
            "v2 = model.a.source.attn_0.source.linear_1.output",
        ),
        (lambda p: p("operator.eq", _read(p), "x" * 70), f"v3 = model.layers[3].output == '{'x' * 59}…'"),
    ],
)
def test_operations(program, record, expected):
    """Each kind of operation is written as the program writes it."""
    program.at("what_it_is()")
    _read(program, "model.norm")
    record(program)
    assert program.lines()[2:] == [f"    {expected}"]


def test_conditionals_are_indented(program):
    """Both branches stand below their condition, and what is chosen after them has one name."""
    h = program.at("h = model.layers[3].output") and _read(program)
    condition = program.at("if h.mean() > 0:")("operator.gt", program("Tensor.mean", h), 0)
    branch = program("control.if", condition)
    program.block = branch.id
    a = program.at("x = h * 2")("operator.mul", h, 2)
    program.block = None
    other = program.at("else:")("control.else", branch)
    program.block = other.id
    b = program.at("x = h * 3")("operator.mul", h, 3)
    program.block = None
    program.at("y = x + 1")
    program.save(program("operator.add", program("control.merge", branch, a, b), 1), "y")
    assert program.lines()[1:] == [
        "    h = model.layers[3].output",
        "    if h.mean() > 0:",
        "        x = h * 2",
        "    else:",
        "        x = h * 3",
        "    y = (x + 1).save()",
    ]


def test_loops_are_indented(program):
    """A loop has its variable, what is carried from pass to pass, and its last and collected values."""
    total = program.at("total = torch.zeros(1)")("torch.zeros", 1)
    rows = program.at("for row in model.layers[3].output:") and _read(program)
    loop = program("control.loop", rows)
    program.block = loop.id
    item, carried = program("control.item", loop), program("control.carried", loop, total)
    program.at("total = total + row")
    program("control.next", carried, program("operator.add", carried, item))
    squares = program.at("squares.append(row * row)")("operator.mul", item, item)
    program.block = None
    end = program("control.end", loop)
    program.at("result = total * 2")
    program.save(program("operator.mul", program("control.final", end, carried), 2), "result")
    program.at("s = squares").save(program("control.collect", end, squares), "s")
    assert program.lines()[1:] == [
        "    total = torch.zeros(1)",
        "    for row in model.layers[3].output:",
        "        total = total + row",
        "        v8 = row * row",
        "    result = (total * 2).save()",
        "    s = [v8 of every pass].save()",
    ]


def test_invokes_are_blocks_of_their_forward(program):
    """What an invoke reads stands in its block; a value of another one has that one's name."""
    one = program.at("with tracer.invoke(a):")("model.invoke", program.forward, 0, 1)
    h = program.at("h = model.layers[3].output")("model.output", one, "model.layers.3")
    two = program.at("with tracer.invoke(b):")("model.invoke", program.forward, 1, 2)
    program.at("model.layers[3].output = h")("model.set_output", two, "model.layers.3", h)
    whole = program.at("all = lm_head.output")("model.output", program.forward, "lm_head")
    program.save(whole, "all")
    assert program.lines() == [
        "with root.trace(<t0>) as trace:",
        "    with invoke(rows 0 to 1) as invoke_1:",
        "        h = model.layers[3].output",
        "    with invoke(rows 1 to 2) as invoke_2:",
        "        model.layers[3].output = h",
        "    all = lm_head.output.save()",
    ]


def test_a_read_before_a_change_keeps_its_name(program):
    """A value that was read before its place was set is not written as what stands there now."""
    before = program.at("use(model.layers[3].output)") and _read(program)
    program.at("model.layers[3].output = 0")("model.set_output", program.forward, "model.layers.3", 0)
    program.at("x = before + 1").save(program("operator.add", before, 1), "x")
    assert program.lines()[1:] == [
        "    v1 = model.layers[3].output",
        "    model.layers[3].output = 0",
        "    x = (v1 + 1).save()",
    ]


def test_refused_graph_is_still_printed():
    """Ids that do not count up, and references forward, are shown as they are."""
    graph = Graph((Node(7, "torch.relu", (Ref(9),)), Node(7, "operator.add")))
    assert str(graph).splitlines()[1:] == ["%7 = torch.relu(%9)", "%7 = operator.add()"]


def test_hostile_texts_stay_in_their_line(program):
    """Line breaks and control characters in names, paths and sources are written as escapes."""
    program.text = "h = 1\nimport os"
    program.save(_read(program, "a\nb\x1b[31m"), "x\ny")
    text = "\n".join(program.lines(comments=True))
    assert len(text.splitlines()) == 2
    assert text.replace("\n", "").isprintable()


_ARGUMENT = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.integers(0, 5).map(Ref),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.builds(slice, inner, inner),
    max_leaves=6,
)
_OPS = [
    *sorted(PROTOCOL),
    "operator.add",
    "operator.getitem",
    "operator.setitem",
    "operator.imul",
    "Tensor.mul_",
    "odd",
]
_SOURCE = st.sampled_from(["h = torch.relu(h)", "x.save()", "for a in b:", "(", ""]).map(
    lambda text: Source("e.py", 3, text)
)


@given(
    nodes=st.lists(
        st.tuples(
            st.sampled_from(_OPS), st.lists(_ARGUMENT, max_size=4), st.none() | st.integers(-1, 6), st.none() | _SOURCE
        ),
        max_size=8,
    ),
    saves=st.dictionaries(st.text(max_size=4), st.integers(0, 7), max_size=3),
)
def test_every_graph_is_printed_and_drawn(nodes, saves):
    """No graph, valid or not, raises, and no text of one breaks a line."""
    from nnsight_hpc.graph.draw import as_dot

    made = [Node(i, op, tuple(args), {}, source, block) for i, (op, args, block, source) in enumerate(nodes)]
    graph = Graph(tuple(made), saves, MODEL)
    assert all(line.isprintable() for line in str(graph).split("\n"))
    assert as_dot(graph).startswith("digraph {")


def test_straight_line_text_is_python(program):
    """The lines of a trace without blocks parse as Python once tensors have names."""
    h = program.at("h = model.layers[3].output") and _read(program)
    for index in range(5):
        h = program.at("h = torch.softmax(h * 0.5 + h.mean(), -1)")(
            "torch.softmax",
            program("operator.add", program("operator.mul", h, index), program("Tensor.mean", h)),
            -1,
        )
    program.save(h, "out")
    ast.parse(re.sub(r"<(t\d)>", r"\1", "\n".join(program.lines())))
