"""Sizes that come as tensors, and memory of Python's own, are accounted for before the run or found out in it, op by op."""

import resource

import pytest
import torch
from torch import nn

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.control import text_of
from nnsight_hpc.execution.estimate import check_memory
from nnsight_hpc.execution.estimate_guard import allocation
from nnsight_hpc.execution.estimate_watch import SLACK, Watch
from nnsight_hpc.execution.fake_model import twin_of
from nnsight_hpc.execution.plain import MAX_CHARACTERS, MAX_ENTRIES
from nnsight_hpc.execution.resolve import carry_out
from nnsight_hpc.graph import DType, GraphBuilder, Ref, TensorRef
from nnsight_hpc.wire.errors import ExecutionFailed, HpcError, InvalidGraph, RequestCancelled
from nnsight_hpc.wire.messages import ModelIdentity
from tests.execution.test_operations import CPU, SPACES, _calls, _flat

NET = nn.Linear(4, 4).requires_grad_(False)
MiB = 1 << 20
LARGE = 3000
_ONE = torch.rand(1, 2, 8, generator=torch.Generator().manual_seed(0))
_WEIGHT = torch.ones(2, 2, 1)
WITH_SIZES = {
    "torch.conv1d": ((_ONE, _WEIGHT), {"padding": LARGE}),
    "torch.nn.functional.conv1d": ((_ONE, _WEIGHT, None, 1, LARGE), {}),
    "torch.conv_transpose1d": ((_ONE, _WEIGHT), {"stride": LARGE}),
    "torch.nn.functional.conv_transpose1d": ((_ONE, _WEIGHT, None, LARGE), {}),
    "torch.nn.functional.unfold": ((_ONE[None], 1), {"padding": LARGE}),
    "torch.nn.functional.interpolate": ((_ONE,), {"scale_factor": float(LARGE)}),
    "torch.nn.functional.adaptive_avg_pool3d": ((_ONE[None, None], LARGE // 100), {}),
    "torch.nn.functional.adaptive_max_pool3d": ((_ONE[None, None], LARGE // 100), {}),
    "torch.fft.rfftfreq": ((LARGE,), {}),
    "torch.normal": ((0.0, 1.0, (LARGE,)), {"generator": torch.Generator()}),
    "torch.randint_like": ((_ONE.expand(LARGE, 2, 8), 9), {"generator": torch.Generator()}),
    "torch.histogramdd": ((_ONE[0, :, :2], LARGE // 30), {}),
    "torch.histogram": ((_ONE, LARGE), {}),
    "einops.repeat": ((_ONE, "a b c -> a (b n) c"), {"n": LARGE}),
    "Tensor.new_full": ((_ONE, (LARGE, 2), 1.0), {}),
}
"""Calls whose size is a number that the examples of the operation do not give, or give by keyword."""


def _places(value, path=()):
    """Where in nested arguments the numbers are."""
    if type(value) in (int, float):
        yield path
    elif isinstance(value, list | tuple) and type(value) is not torch.Size:
        for index, item in enumerate(value):
            yield from _places(item, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, (*path, key))


def _with(value, path, new):
    """The same arguments with `new` at one place."""
    if not path:
        return new
    if isinstance(value, dict):
        return {**value, path[0]: _with(value[path[0]], path[1:], new)}
    return type(value)(_with(item, path[1:], new) if index == path[0] else item for index, item in enumerate(value))


def _made(result, given):
    """Bytes of the memory in a result that was not given."""
    known = {tensor.untyped_storage().data_ptr() for tensor in _flat(given)}
    made = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _flat(result)}
    return sum(size for address, size in made.items() if address not in known)


def _variants(op):
    """Calls of an operation with each of its numbers large: as a number, and as a tensor of one element."""
    calls = [*_calls(op)]
    for call in [*calls[:14], *calls[-3:]]:  # its own example, those with a matrix, and those with numbers alone
        for path in _places(call):
            yield from (_with(call, path, size) for size in (LARGE, torch.tensor(LARGE)))
    if op in WITH_SIZES:
        yield WITH_SIZES[op]
        for path in _places(WITH_SIZES[op]):
            yield _with(WITH_SIZES[op], path, torch.tensor(LARGE))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("space", SPACES)
def test_operation_never_takes_more_than_is_found_out_before(space):
    """Whatever an operation makes of a size, given as a number or as a tensor, is known from its arguments before it runs."""
    twin = twin_of(NET)
    for op, (args, kwargs) in ((name, call) for name in SPACES[space] for call in _variants(name)):
        try:
            made = _made(carry_out(op, args, kwargs, CPU), (args, kwargs))
        except Exception:  # noqa: BLE001 - not every operation takes a size there
            continue
        if made > LARGE:
            assert allocation(twin, op, args, kwargs) >= made - 64, (op, args, kwargs)


def test_operations_with_sizes_are_among_those_tried():
    """Each call that the test above has for want of an example makes much, or it would try nothing."""
    for op, (args, kwargs) in WITH_SIZES.items():
        assert _made(carry_out(op, args, kwargs, CPU), args) > LARGE


def _graph(*nodes, saved=()):
    builder = GraphBuilder()
    for op, *args in nodes:
        kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
        builder.append(op, tuple(args), {k: v for k, v in kwargs.items() if k != "block"}, None, kwargs.get("block"))
    saves = {f"s{number}": builder.add("save", Ref(number)) for number in saved}
    return builder.build(saves, ModelIdentity(id="net"))


SIZE = TensorRef("n")
BY_TENSOR = {
    "ones": (("torch.ones", [SIZE]),),
    "full": (("torch.full", (SIZE,), 1.0),),
    "arange": (("torch.arange", SIZE),),
    "linspace": (("torch.linspace", 0, 1, SIZE),),
    "repeat": (("Tensor.repeat", TensorRef("x"), SIZE),),
    "computed": (("torch.mul", SIZE, 2), ("Tensor.reshape", Ref(0), ()), ("torch.ones", [Ref(1)])),
    "item": (("Tensor.item", SIZE), ("torch.zeros", Ref(0))),
    "index": (("operator.getitem", SIZE, ...), ("torch.zeros", [Ref(0), 2])),
    "float": (("Tensor.float", SIZE), ("torch.arange", 0, Ref(0))),
    "pad": (("torch.nn.functional.pad", TensorRef("x"), (0, SIZE)),),
}


@pytest.mark.parametrize("nodes", BY_TENSOR.values(), ids=BY_TENSOR.keys())
def test_size_given_as_a_tensor_is_in_the_estimate(nodes):
    """A constant of one element is a size like any other, also when it is computed with: refused before the run."""
    tensors = {"n": torch.tensor(10**11), "x": torch.ones(4)}
    with pytest.raises(InvalidGraph, match=r"iB of memory; the budget is 100 MiB"):
        check_memory(_graph(*nodes), tensors, NET, 100 * MiB)
    assert check_memory(_graph(*nodes), {**tensors, "n": torch.tensor(4)}, NET, 100 * MiB).unchecked == frozenset()


def test_estimate_with_sizes_is_kept_by_their_values():
    """The same program with another size is another estimate; one whose sizes are no tensors is kept for all values."""
    sized, scaled = _graph(("torch.ones", [SIZE])), _graph(("torch.mul", TensorRef("x"), SIZE))
    x = torch.ones(4)
    estimates = [check_memory(sized, {"n": torch.tensor(n)}, NET).estimate for n in (1000, 2000, 1000)]
    expected = [1000 * 4 + 8, 2000 * 4 + 8, 1000 * 4 + 8]
    assert expected == estimates
    guards = [check_memory(scaled, {"n": torch.tensor(n), "x": x}, NET) for n in (1, 2)]
    assert guards[0].unchecked is guards[1].unchecked


BY_CONSTANT = {
    "repeat": (("torch.tensor", 1.0), ("Tensor.repeat", Ref(0), 10**8)),
    "clone": (("torch.tensor", 1.0), ("Tensor.expand", Ref(0), 10**8), ("Tensor.clone", Ref(1))),
    "histogram": (("torch.zeros", 8), ("torch.histogram", Ref(0), 10**8)),
    "histogramdd": (("torch.zeros", 8, 2), ("torch.histogramdd", Ref(0), 10**4)),
    "geqrf": (("torch.zeros", 1), ("Tensor.expand", Ref(0), 10**4, 10**4), ("torch.geqrf", Ref(1))),
    "interpolate": (("torch.zeros", 1, 1, 4), ("torch.nn.functional.interpolate", Ref(0), {"scale_factor": 1e8})),
}


@pytest.mark.parametrize("nodes", BY_CONSTANT.values(), ids=BY_CONSTANT.keys())
def test_estimate_itself_takes_no_memory(nodes):
    """Nothing is computed for real to know its size: torch's fake tensors would, of constants, and without a fake form."""
    check_memory(_graph(), {}, NET)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        guard = check_memory(_graph(*nodes), {}, NET, 100 * MiB)
    except InvalidGraph as error:
        assert "iB of memory" in str(error)  # noqa: PT017 - refused now, or left to be looked at in the run
    else:
        assert guard.unchecked
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 64 * MiB


@pytest.mark.parametrize("name", ["histogram", "histogramdd"])
def test_bins_are_bounded_in_the_run(name):
    """Bins whose number is known, but of which there is no fake form, are looked at before they are made."""
    graph = _graph(*BY_CONSTANT[name])
    with pytest.raises(InvalidGraph, match="iB of memory"):
        run_graph(graph, {}, NET, guard=check_memory(graph, {}, NET, 100 * MiB))


PYTHON = {
    "lists": [("operator.mul", [0], 10**5) for _ in range(3)],
    "text": [("operator.mul", ["A" * 60_000], 250)],
    "tuples": [("operator.mul", (1,), 10**5) for _ in range(3)],
}


@pytest.mark.parametrize("name", ["lists", "tuples"])
def test_lists_are_in_the_estimate(name):
    """Lists of numbers count as what Python takes for them, while they are held."""
    with pytest.raises(InvalidGraph, match="iB of memory"):
        check_memory(_graph(*PYTHON[name], saved=range(3)), {}, NET, 10 * MiB)


def test_text_in_a_result_is_in_the_estimate():
    """A text that a list has many times is one object in a run, and is written many times in its result."""
    graph = _graph(*PYTHON["text"])
    assert check_memory(graph, {}, NET).estimate < MiB
    saved = _graph(*PYTHON["text"], saved=[0])
    assert check_memory(saved, {}, NET).estimate > 250 * 60_000


def test_text_of_one_value_is_bounded():
    """A list that holds a long text over and over is refused where it is made."""
    graph = _graph(("operator.mul", ["A" * 60_000], 20_000))
    with pytest.raises(ExecutionFailed, match=f"more than {MAX_CHARACTERS} characters"):
        run_graph(graph, {}, NET)


ODD = [
    1,
    2.5,
    "a",
    "it's",
    None,
    True,
    (1,),
    (),
    [],
    {},
    {"a": [1, (2, "b")]},
    torch.Size([2]),
    torch.float32,
    range(3),
    1j,
]


@pytest.mark.parametrize("value", [*ODD, ODD, tuple(ODD), torch.arange(3), [torch.ones(2)]], ids=str)
def test_short_values_are_logged_as_python_prints_them(value):
    """A part of a logged line is what `str` gives."""
    assert text_of(value) == str(value)


@pytest.mark.timeout(120)
def test_long_values_are_logged_by_their_beginning():
    """Of a million tensors no more is written than is shown."""
    many = [torch.ones(1000)] * MAX_ENTRIES
    assert text_of([many] * 1000).startswith("[[tensor([1., 1.")
    assert len(text_of(many)) == 10_001
    assert text_of("é" * 10**7) == "é" * 10_000 + "…"


def _loop(*body, passes=10**6):
    """A loop over a range that a tensor gives, so that the number of its passes is not known before the run."""
    start = (("Tensor.tolist", TensorRef("x")), ("container.list",), ("control.loop", Ref(0)))
    return _graph(*start, *[(*node, {"block": 2}) for node in body], ("control.end", Ref(2)))


def test_loop_that_gathers_memory_is_stopped(monkeypatch):
    """What no estimate knows, the number of passes of a loop over data, is seen in the memory that the run takes."""
    monkeypatch.setattr("nnsight_hpc.execution.estimate_watch.SLACK", 0)
    graph = _loop(("torch.ones", 25_000), ("container.append", Ref(1), Ref(3)))
    tensors = {"x": torch.zeros(20_000)}
    guard = check_memory(graph, tensors, NET, 300 * MiB)
    with pytest.raises(InvalidGraph, match=r"the run has taken .* of memory"):
        run_graph(graph, tensors, NET, guard=guard)


def test_list_has_an_end(monkeypatch):
    """A list that is appended to is bounded like one that is made."""
    monkeypatch.setattr("nnsight_hpc.execution.special.MAX_ENTRIES", 1000)
    graph = _loop(("container.append", Ref(1), 1))
    with pytest.raises(ExecutionFailed, match="a list of more than 1000 entries"):
        run_graph(graph, {"x": torch.zeros(1001)}, NET)


def test_watch_lets_a_process_breathe():
    """A run is held against its budget and what a process may grow by for other reasons."""
    node = _graph(("torch.ones", 1)).nodes[0]
    watch = Watch(torch.device("cpu"), 0)
    watch.look(node)
    held = torch.ones(64 * MiB // 4)
    watch._next = 0.0
    watch.look(node)
    assert held.numel() * 4 < SLACK


@pytest.mark.parametrize("where", [torch.arange(10**6 + 1), [0] * (10**6 + 1)], ids=["tensor", "list"])
def test_pieces_of_a_tensor_are_bounded(where):
    """A tensor is not cut at a million places, given by a list or by a tensor."""
    with pytest.raises(ValueError, match="pieces of a tensor"):
        carry_out("torch.tensor_split", (torch.zeros(4), where), {}, CPU)


def test_long_tensor_is_cut_in_two():
    """The number of pieces counts, not the length of the tensor."""
    x = torch.zeros(1).expand(3 * 10**6)
    assert [p.shape[0] for p in carry_out("torch.split", (x, [10**6, 2 * 10**6]), {}, CPU)] == [10**6, 2 * 10**6]


def test_cancel_is_seen_while_memory_is_estimated():
    """An estimate of many nodes asks before each whether it is still wanted."""
    asked = []
    graph = _graph(*[("torch.ones", 2) for _ in range(100)])
    with pytest.raises(RequestCancelled):
        check_memory(graph, {}, NET, cancelled=lambda: asked.append(1) or len(asked) > 50)
    assert len(asked) == 51


def test_value_of_a_constant_does_not_enter_the_model():
    """What is kept of the model by the shapes of its inputs does not depend on their values."""

    class Branches(nn.Module):
        def forward(self, value):
            return value.expand(int(value.sum()), 4).clone() if value.numel() == 1 else value

    model = nn.Sequential(Branches())
    builder = GraphBuilder()
    forward = builder.add("model.forward", TensorRef("x"))
    value = builder.add("model.output", Ref(forward), "0")
    graph = builder.build({"s": builder.add("save", Ref(value))}, ModelIdentity(id="m"))
    results = []
    for n in (2.0, 5.0):
        tensors = {"x": torch.tensor([n])}
        guard = check_memory(graph, tensors, model)
        results.append(run_graph(graph, tensors, model, guard=guard)["s"].shape[0])
    assert results == [2, 5]


@pytest.mark.parametrize("seen_as", [(), DType("int32")], ids=["shape", "dtype"])
def test_write_into_a_constant_is_not_taken_for_its_first_value(seen_as):
    """A value that was written into, also by another view of its memory, is known no longer."""
    graph = _graph(
        ("torch.tensor", [4]),
        ("Tensor.view", Ref(0), seen_as),
        ("Tensor.add_", Ref(1), TensorRef("n")),
        ("torch.ones", [Ref(0)]),
    )
    guard = check_memory(graph, {"n": torch.tensor(10**9)}, NET, 100 * MiB)
    assert 3 in guard.unchecked
    with pytest.raises(HpcError):
        run_graph(graph, {"n": torch.tensor(10**9)}, NET, guard=guard)
