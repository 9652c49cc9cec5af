"""The names of operations, on functions whose operations are easy to count by hand."""

import linecache
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nnsight_hpc.execution.parsing import parse
from nnsight_hpc.execution.source import instrumented, operations_of
from nnsight_hpc.wire.errors import InvalidGraph

_FILES = count()


def made(source, **namespace):
    """Run `source` as if it were a file, whose text can be read again, and return its names."""
    file = f"<test file {next(_FILES)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), namespace)
    return namespace


def names(source):
    return [operation.name for operation in parse(made(source)["f"].__code__).operations]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return g(x)", ["g_0"]),
        ("return g(g(x))", ["g_0", "g_1"]),
        ("return torch.nn.functional.relu(x)", ["torch_nn_functional_relu_0"]),
        ("return self.a.b(x).view(1).view(2)", ["self_a_b_0", "view_0", "view_1"]),
        ("return (x + y).sum()", ["sum_0"]),
        ("return self.layers[0](x), table[x].get(y)", ["self_layers_0", "table_get_0"]),
        ("return make()(x)", ["make_0", "call_0"]),
        ("h = x + 1", ["h_0"]),
        ("h: int = g(x)\nh: str", ["g_0", "h_0"]),
        ("a, b = x, g(y)", ["g_0", "a_0", "b_0"]),
        ("a, b = g(x)", ["g_0"]),
        ("a = b = g(x)", ["g_0"]),
        ("self.state = x\ntable[1] = y", ["self_state_0", "table_0"]),
        ("g = find(x)\nreturn g(x)", ["find_0", "g_0"]),
        ("table[i(x)] = v(x)", ["v_0", "i_0", "table_0"]),
        ("x += g(x)", ["g_0"]),
        ("return [g(i) for i in h(x)]", ["g_0", "h_0"]),
        ("return super().f(x)", ["f_0"]),
        ("return locals(), eval('1')", []),
        ("def g(y=h(1)):\n    return k(y)\nreturn g(x)", ["h_0", "k_0", "g_0"]),
    ],
)
def test_names_of_operations(body, expected):
    """Callees' dotted names with a number each, inner calls first; assignments by their target, unless it is called."""
    indented = body.replace("\n", "\n    ")
    assert names(f"def f(self, x: str(1), y=str(2)) -> str(3):\n    {indented}\n") == expected


def test_lines_are_those_of_the_file():
    """An operation is at the line where its expression begins, with that line's text."""
    parsed = parse(
        made("import torch\n\n\ndef f(x):\n    '''Text\nat the margin'''\n    return abs(\n        x)\n")["f"].__code__
    )
    (operation,) = parsed.operations
    assert (parsed.line, operation.line, operation.text) == (4, 7, "return abs(")
    assert parsed.text == "def f(x):\n    '''Text\nat the margin'''\n    return abs(\n        x)\n"


def test_code_that_is_in_no_file_is_refused():
    """What was executed from a string has no source, and the error says so."""
    namespace = {}
    exec("def f(x):\n    return abs(x)\n", namespace)
    with pytest.raises(InvalidGraph, match=r"f has no source that can be read[\s\S]*<string>"):
        parse(namespace["f"].__code__)


def test_lambda_is_refused():
    """A lambda has no definition of its own."""
    with pytest.raises(InvalidGraph, match="it is a lambda"):
        parse((lambda x: x + 1).__code__)


def test_file_that_has_changed_is_refused():
    """Where another function stands at the line now, its operations are not taken for those of the one that runs."""
    function = made("def f(x):\n    return abs(x)\n")["f"]
    file = function.__code__.co_filename
    linecache.cache[file] = (1, None, ["def other(x):\n", "    return 1\n"], file)
    with pytest.raises(InvalidGraph, match="has changed since it was loaded"):
        parse(function.__code__)


def test_operation_that_is_not_there_is_refused_with_near_names():
    """The error lists what there is, and what is meant."""
    with pytest.raises(InvalidGraph, match=r"no operation 'abs_1'[\s\S]*it has abs_0, h_0[\s\S]*did you mean abs_0\?"):
        parse(made("def f(x):\n    h = abs(x)\n    return h\n")["f"].__code__).require(["abs_1"])


def _expressions():
    def wider(inner):
        return st.one_of(
            inner.map("f({})".format),
            st.tuples(inner, inner).map("g(*[{0[0]}], y={0[1]})".format),
            st.tuples(inner, inner).map("({0[0]} - {0[1]})".format),
            inner.map("{}.add(2)".format),
            inner.map("table[0]({})".format),
            st.tuples(inner, inner).map("[{0[0]}, {0[1]}][1]".format),
            st.tuples(inner, inner).map("({0[0]} if x.sum() > 0 else {0[1]})".format),
            inner.map("sum([i * 2 for i in [{}]])".format),
        )

    return st.recursive(st.sampled_from(["x", "h", "self.weight"]), wider, max_leaves=6)


_STATEMENTS = st.one_of(
    _expressions().map("h = {}".format),
    _expressions().map("h += {}".format),
    _expressions().map("h, k = {}, 1".format),
    _expressions().map("table[1:] = [{}]".format),
    _expressions().map("for x in [x, {}]:\n            h = h + x".format),
)


@given(st.lists(_STATEMENTS, min_size=1, max_size=4))
def test_any_forward_runs_as_before_and_in_the_listed_order(statements):
    """All operations handed on, the result is the same bit for bit; each is first met in the order of the list."""
    body = "".join(f"        {statement}\n" for statement in statements)
    module = made(
        "import torch\n"
        "def f(x): return x * 3\n"
        "def g(x, *, y): return x - y\n"
        "class M(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        h, table = x, [torch.sin]\n"
        f"{body}"
        "        return h\n"
    )["M"]()
    module.weight = nn.Parameter(torch.tensor([0.5, -2.0]), requires_grad=False)
    x, met = torch.tensor([1.0, 3.0]), []

    def callback(name, function, args, kwargs):
        output = function(*args, **kwargs)
        met.append(name)
        return output

    expected = module(x.clone())
    listed = [operation.name for operation in operations_of(module)]
    with instrumented(module, listed, callback):
        got = module(x.clone())
    assert torch.equal(got, expected)
    assert len(set(listed)) == len(listed)
    straight = not any(statement.startswith("for") or " if " in statement for statement in statements)
    if straight:
        assert met == listed
    assert set(met) <= set(listed)
