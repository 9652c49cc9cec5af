import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.graph import Device, DType, Graph, GraphBuilder, Ref, TensorRef
from nnsight_hpc.graph.codec import dump_value, load_value
from nnsight_hpc.graph.limits import MAX_LINE, MAX_NAME, MAX_PATH, MAX_STRING
from nnsight_hpc.graph.nodes import Source
from nnsight_hpc.wire.errors import InvalidGraph
from nnsight_hpc.wire.messages import ModelIdentity

integers = st.integers(-(2**63) + 1, 2**63 - 1)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    integers,
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.complex_numbers(allow_nan=False, allow_infinity=False),
    st.just(...),
    st.builds(Ref, st.integers(0, 9)),
    st.builds(TensorRef, st.text(max_size=9)),
    st.builds(DType, st.sampled_from(["float32", "bool"])),
    st.builds(Device, st.just("cpu")),
    st.builds(slice, st.none() | integers, st.none() | integers, st.none() | integers),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=9), inner, max_size=3),
    ),
    max_leaves=12,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=20,
)


@given(values)
def test_every_argument_survives_json(value):
    """Whatever an argument may be, it is the same, with the same types, after JSON."""
    assert load_value(json.loads(json.dumps(dump_value(value), allow_nan=False)), "args", 0) == value


@pytest.mark.parametrize("name", ["nan", "inf", "-inf"])
def test_special_floats_survive(name):
    """NaN and infinities, which JSON lacks, survive."""
    assert str(load_value(dump_value(float(name)), "args", 0)) == name


@given(json_values)
def test_any_json_is_an_argument_or_refused(value):
    """Arbitrary JSON in an argument's place is read or refused, never anything else."""
    try:
        load_value(value, "args", 0)
    except InvalidGraph:
        return


@given(st.one_of(st.binary(), st.text(), json_values.map(json.dumps)))
def test_any_document_is_refused_cleanly(document):
    """Bytes, text and JSON that is no graph are refused as InvalidGraph."""
    with pytest.raises(InvalidGraph):
        Graph.from_json(document)


def _graph():
    builder = GraphBuilder()
    forward = builder.add("model.forward", TensorRef("x"), use_cache=False)
    value = builder.add("model.output", Ref(forward), "layers.3")
    saved = builder.add("save", Ref(value))
    return builder.build({"hidden": saved}, ModelIdentity(id="m", fingerprint="f"))


def test_graph_survives_json():
    """A graph read from its document is the same graph."""
    assert Graph.from_json(_graph().to_json()) == _graph()


def test_same_program_gives_same_bytes():
    """Two recordings of one program give the same document."""
    assert _graph().to_json() == _graph().to_json()


HOSTILE = {
    "another format": {"format": "pickle"},
    "another version": {"version": 2},
    "unknown key": {"code": "import os"},
    "nodes no list": {"nodes": {}},
    "node no object": {"nodes": [7]},
    "unknown key of a node": {"nodes": [{"id": 0, "op": "save", "call": "os.system"}]},
    "id a boolean": {"nodes": [{"id": True, "op": "save"}]},
    "id a fraction": {"nodes": [{"id": 0.5, "op": "save"}]},
    "huge integer": {"nodes": [{"id": 0, "op": "save", "args": [10**30]}]},
    "unknown type": {"nodes": [{"id": 0, "op": "save", "args": [{"pickle": "gASV"}]}]},
    "two types": {"nodes": [{"id": 0, "op": "save", "args": [{"ref": 0, "tuple": []}]}]},
    "slice of four": {"nodes": [{"id": 0, "op": "save", "args": [{"slice": [1, 2, 3, 4]}]}]},
    "float by another name": {"nodes": [{"id": 0, "op": "save", "args": [{"float": "1e400"}]}]},
    "save no id": {"saves": {"a": "b"}},
    "model no object": {"model": "gpt2"},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_document_of_a_wrong_form_is_refused(change):
    """Each wrong form is refused."""
    with pytest.raises(InvalidGraph):
        Graph.from_json(json.dumps({**json.loads(_graph().to_json()), **change}))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ('{"format": "nnsight-hpc/graph", "format": "x"}', "duplicate key 'format'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ("9" * 10_000, "not valid JSON"),
    ],
)
def test_json_tricks_are_refused(document, message):
    """Duplicate keys, deep nesting, NaN literals and endless integers are refused with their name."""
    with pytest.raises(InvalidGraph) as caught:
        Graph.from_json(document)
    assert message in str(caught.value)


def _node(**changes):
    return {"nodes": [{"id": 0, "op": "save", **changes}]}


LENGTHS = {
    "operation": (MAX_NAME, lambda text: _node(op=text)),
    "keyword": (MAX_NAME, lambda text: _node(kwargs={text: 1})),
    "tensor": (MAX_NAME, lambda text: _node(args=[{"tensor": text}])),
    "dtype": (MAX_NAME, lambda text: _node(args=[{"dtype": text}])),
    "device": (MAX_NAME, lambda text: _node(args=[{"device": text}])),
    "value": (MAX_STRING, lambda text: _node(args=[text])),
    "key of a dict": (MAX_STRING, lambda text: _node(args=[{"dict": [[text, 1]]}])),
    "file": (MAX_PATH, lambda text: _node(source=[text, 1, "x"])),
    "line": (MAX_LINE, lambda text: _node(source=["f.py", 1, text])),
    "saved value": (MAX_NAME, lambda text: {"saves": {text: 0}}),
    "kind": (MAX_NAME, lambda text: {"kind": text}),
    "model": (MAX_PATH, lambda text: {"model": {"id": text}}),
    "fingerprint": (MAX_NAME, lambda text: {"model": {"id": "m", "fingerprint": text}}),
    "revision": (MAX_NAME, lambda text: {"model": {"id": "m", "revision": text}}),
}


@pytest.mark.parametrize(("limit", "change"), LENGTHS.values(), ids=LENGTHS.keys())
def test_string_is_bounded(limit, change):
    """Every string of a document may be as long as its limit, and no longer; the refusal names the limit and is short."""
    document = json.loads(_graph().to_json())
    Graph.from_json(json.dumps(document | change("x" * limit)))
    with pytest.raises(InvalidGraph, match=f"the limit is {limit}") as refused:
        Graph.from_json(json.dumps(document | change("x" * (limit + 1))))
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "change",
    [
        {"version": "x" * 10**6},
        {"x" * 10**6: 1},
        _node(args=[{"x" * 10**6: 1}]),
        _node(kwargs={"x" * 999: {"y" * 10**6: 1}}),
    ],
)
def test_refusal_does_not_repeat_what_is_long(change):
    """Of an unknown key, type or version the refusal shows the beginning."""
    with pytest.raises(InvalidGraph) as refused:
        Graph.from_json(json.dumps(json.loads(_graph().to_json()) | change))
    assert len(str(refused.value)) < 600


def test_long_line_of_the_user_is_cut():
    """A recorded line that is longer than a document may hold is cut when it is written, and does not hinder the request."""
    builder = GraphBuilder()
    builder.add("torch.zeros", 2, source=Source("/" + "d" * 5000, 7, "x = " + "1" * 5000))
    source = Graph.from_json(builder.build({}, ModelIdentity(id="m")).to_json()).nodes[0].source
    assert source == Source("d" * MAX_PATH, 7, "x = " + "1" * (MAX_LINE - 4))
