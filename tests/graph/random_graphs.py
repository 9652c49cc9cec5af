"""Documents made at random: mutations of valid ones, and lists of nodes over the operations that there are."""

import copy
import json

from hypothesis import strategies as st

from nnsight_hpc.graph import GraphBuilder
from nnsight_hpc.graph.nodes import Device, DType, Graph, Node, Ref, Seed, TensorRef
from nnsight_hpc.graph.operations import ALLOWED, ATTRIBUTES, FIELDS, PROTOCOL, RANDOM
from nnsight_hpc.wire.messages import ModelIdentity


def _point():
    builder = GraphBuilder()
    forward = builder.add("model.forward", TensorRef("x"))
    value = builder.add("model.output", Ref(forward), "0", call=0)
    part = builder.add("operator.getitem", Ref(value), (..., slice(0, 2, None)))
    builder.add("model.set_output", Ref(forward), "0", Ref(builder.add("operator.mul", Ref(value), 2.0)))
    noise = builder.add("torch.randn", 2, generator=Seed(3))
    total = builder.add("torch.sum", Ref(builder.add("operator.add", Ref(part), Ref(noise))), dtype=DType("float32"))
    return builder, total


def _conditional():
    builder, total = _point()
    condition = builder.add("control.if", Ref(builder.add("operator.gt", Ref(total), 0)))
    yes = builder.add("torch.exp", Ref(total), block=condition)
    otherwise = builder.add("control.else", Ref(condition))
    no = builder.add("operator.neg", Ref(total), block=otherwise)
    return builder, builder.add("control.merge", Ref(condition), Ref(yes), Ref(no))


def _loop():
    builder, total = _point()
    loop = builder.add("control.loop", Ref(builder.add("control.range", 3)))
    item = builder.add("control.item", Ref(loop), block=loop)
    variable = builder.add("control.carried", Ref(loop), Ref(total), block=loop)
    following = builder.add("operator.add", Ref(variable), Ref(item), block=loop)
    builder.add("control.next", Ref(variable), Ref(following), block=loop)
    end = builder.add("control.end", Ref(loop))
    builder.add("save", Ref(builder.add("control.collect", Ref(end), Ref(following))))
    return builder, builder.add("control.final", Ref(end), Ref(variable))


def _containers():
    builder, total = _point()
    items = builder.add("container.list", 1, Ref(total))
    builder.add("container.append", Ref(items), Ref(total))
    table = builder.add("container.dict", a=Ref(items))
    builder.add("log", "items", Ref(items))
    return builder, builder.add("operator.getitem", Ref(table), "a")


def _gradient():
    builder = GraphBuilder()
    forward = builder.add("model.forward", TensorRef("x"))
    rows = builder.add("model.invoke", Ref(forward), 0, 2)
    value = builder.add("model.output", Ref(rows), "0")
    loss = builder.add("torch.sum", Ref(builder.add("model.output", Ref(rows), "")))
    backward = builder.add("grad.backward", Ref(loss), retain_graph=True)
    return builder, builder.add("grad.read", Ref(value), backward=Ref(backward))


def _built(make):
    builder, result = make()
    return builder.build({"result": builder.add("save", Ref(result))}, ModelIdentity(id="m"))


VALID = {make.__name__[1:]: _built(make) for make in (_point, _conditional, _loop, _containers, _gradient)}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 12)
    | st.floats()
    | st.sampled_from(["", "0", "save", "layers.0", "__class__", "torch.add", "cuda", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["ref", "tensor", "tuple", "dict", "slice", "float", "dtype", "device", "seed", "x"]),
            inner,
            max_size=2,
        )
    ),
    max_leaves=6,
)


@st.composite
def mutated_documents(draw):
    """The text of a valid document in which a few places were replaced, removed, doubled, or exchanged."""
    document = json.loads(draw(st.sampled_from(list(VALID.values()))).to_json())
    for _ in range(draw(st.integers(1, 4))):
        places = list(_places(document))
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "remove", "double", "exchange"])):
            case "replace":
                holder[key] = draw(json_values)
            case "remove":
                del holder[key]
            case "double" if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case _:
                other, place = draw(st.sampled_from(places))
                holder[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(holder[key])
    return json.dumps(document)


def _places(value):
    """Every place in a JSON value, as what holds it and under which key."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


_numbers = st.integers(-2, 4)
_constants = st.one_of(
    st.none(),
    st.booleans(),
    _numbers,
    st.floats(allow_nan=True),
    st.sampled_from(["", "0", "0:linear", "sum", "a b -> b a", "mean", "cpu", "i->i", "__class__"]),
    st.just(...),
    st.builds(TensorRef, st.sampled_from(["x", "missing", "../x"])),
    st.builds(DType, st.sampled_from(["float32", "int64", "bool", "qint8"])),
    st.builds(Device, st.sampled_from(["cpu", "cuda", "disk"])),
    st.builds(Seed, st.integers(-1, 3)),
    st.builds(slice, st.none() | _numbers, st.none() | _numbers, st.none() | _numbers),
)
_operations = st.one_of(
    st.sampled_from(sorted(PROTOCOL)),
    st.sampled_from(sorted(ALLOWED - PROTOCOL)),
    st.sampled_from(sorted(RANDOM)),
    st.sampled_from(
        [
            "operator.getitem",
            "operator.setitem",
            "operator.mul",
            "operator.iadd",
            "attribute",
            "torch.load",
            "os.system",
        ]
    ),
)
_keywords = st.sampled_from(
    ["dim", "call", "optional", "generator", "out", "dtype", "backward", "retain_graph", "__class__", "a"]
)


@st.composite
def graphs(draw):
    """A graph of random nodes; most refer to nodes before them, some to themselves or later ones."""
    nodes = [Node(0, "model.forward", (TensorRef("x"),)), Node(1, "model.output", (Ref(0), "0"))]
    nodes += [draw(_nodes(index)) for index in range(2, draw(st.integers(3, 12)))]
    saves = {f"s{node.id}": node.id for node in nodes if node.op == "save"}
    return Graph(tuple(nodes), saves, ModelIdentity(id="m"))


@st.composite
def _nodes(draw, index):
    refs = st.builds(Ref, st.integers(0, index - 1) | st.just(1) | st.integers(-1, index + 2))
    value = st.one_of(refs, refs, _constants, st.sampled_from(sorted(ATTRIBUTES | FIELDS)))
    nested = value | st.lists(value, max_size=2) | st.lists(value, max_size=2).map(tuple)
    op = draw(_operations)
    args = draw(st.lists(nested, max_size=3))
    if args and draw(st.booleans()):
        args[0] = draw(refs)
    kwargs = draw(st.dictionaries(_keywords, nested, max_size=1))
    if op in RANDOM and draw(st.booleans()):
        kwargs = {"generator": Seed(1)}
    block = draw(st.none() | st.none() | st.integers(0, index))
    return Node(index, op, tuple(args), kwargs, None, block)


@st.composite
def programs(draw):
    """A valid graph: operations on what is there, some in conditionals and loops; whether they suit their values is chance."""
    builder = GraphBuilder()
    forward = builder.add("model.forward", TensorRef("x"))
    output, weight = builder.add("model.output", Ref(forward), "fc"), builder.add("model.parameter", "fc", "weight")
    values = [output, output, output, weight]
    saved = {}
    for _ in range(draw(st.integers(1, 6))):
        block, inner = draw(_opened(builder, values)), list(values)
        for _ in range(draw(st.integers(1, 2))):
            inner.append(draw(_operation(builder, inner, block)))
        if block is not None and builder.nodes[block].op == "control.loop":
            end = builder.add("control.end", Ref(block))
            values.append(
                builder.add(draw(st.sampled_from(["control.final", "control.collect"])), Ref(end), Ref(inner[-1]))
            )
        elif block is not None:
            values.append(builder.add("control.merge", Ref(block), Ref(inner[-1]), Ref(inner[0])))
        else:
            values += inner[len(values) :]
        save = builder.add("save", Ref(values[-1]))
        saved[f"s{save}"] = save
    return builder.build(saved, ModelIdentity(id="m"))


@st.composite
def _opened(draw, builder, values):
    """A block that has just been opened, or none."""
    match draw(st.sampled_from(["none", "none", "none", "if", "loop"])):
        case "if":
            return builder.add("control.if", draw(st.sampled_from([True, False, Ref(values[0])])))
        case "loop":
            return builder.add("control.loop", draw(st.sampled_from([Ref(values[0]), (1, 2), []])))


@st.composite
def _operation(draw, builder, values, block):
    ref = st.sampled_from(values).map(Ref)
    few = ref | ref | _numbers | st.sampled_from([0.5, True, (0, 1), (), slice(0, 1, None), ..., "a b -> b a", "mean"])
    op = draw(
        st.one_of(
            st.sampled_from(sorted(ALLOWED - PROTOCOL)),
            st.sampled_from(
                ["operator.getitem", "operator.add", "operator.mul", "attribute", "operator.setitem", "container.list"]
            ),
            st.sampled_from(
                ["Tensor.zero_", "Tensor.view", "Tensor.sum", "Tensor.unbind", "operator.iadd", "container.append"]
            ),
        )
    )
    kwargs = {"generator": Seed(1)} if op in RANDOM else {}
    match op:
        case "attribute":
            args = (draw(ref), draw(st.sampled_from(sorted(ATTRIBUTES | FIELDS))))
        case "operator.setitem":
            args = (draw(ref), draw(few), draw(few))
        case "container.append":
            args = (draw(ref), draw(few))
        case _:
            args = (draw(ref), *draw(st.lists(few, max_size=1) | st.lists(few, max_size=2)))
    return builder.add(op, *args, block=block, **kwargs)
