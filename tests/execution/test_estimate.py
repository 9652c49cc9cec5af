"""Graphs that would take more memory than there is are refused before they run, quickly and without taking any."""

import resource
import time

import pytest
import torch
from torch import nn

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.estimate import check_memory
from nnsight_hpc.execution.estimate_budget import in_words, memory_budget
from nnsight_hpc.execution.fake_model import twin_of
from nnsight_hpc.graph import DType, GraphBuilder, Ref, TensorRef
from nnsight_hpc.graph.nodes import Source
from nnsight_hpc.wire.errors import ExecutionFailed, InvalidGraph
from nnsight_hpc.wire.messages import ModelIdentity
from tests.execution.measured import peak_of

LINE = Source("script.py", 12, "big = torch.outer(z, z)")
MiB = 1 << 20
BUDGET = 4 << 30
NET = nn.Sequential(nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 1024)).requires_grad_(False)
X = {"x": torch.zeros(8, 64)}


class Document(GraphBuilder):
    """A graph with one forward of `NET` and its hidden state of 8 times 1024 numbers."""

    def __init__(self):
        super().__init__()
        self.saves = {}
        self.forward = self.add("model.forward", TensorRef("x"))
        self.hidden = Ref(self.add("model.output", Ref(self.forward), "1"))

    def ref(self, op, *args, block=None, **kwargs):
        return Ref(self.append(op, args, kwargs, LINE, block))

    def save(self, value, block=None):
        self.saves[f"s{len(self.saves)}"] = self.ref("save", value, block=block).id

    def loop(self, over):
        start = self.ref("control.loop", over)
        return start, self.ref("control.item", start, block=start.id)

    def million(self):
        return self.ref("torch.zeros", 10**6)

    def graph(self):
        return self.build(self.saves, ModelIdentity(id="net"))


HOSTILE = {}


def hostile(function):
    HOSTILE[function.__name__] = function
    return function


ONE_NODE = {
    "zeros": ("torch.zeros", 10**12),
    "ones": ("torch.ones", 10**6, 10**6),
    "full": ("torch.full", (10**6, 10**6), 1.0),
    "arange": ("torch.arange", 10**12),
    "eye": ("torch.eye", 10**6),
    "tril_indices": ("torch.tril_indices", 10**6, 10**6),
    "repeat": ("Tensor.repeat", Ref(1), 10**5, 10**5),
    "tile": ("torch.tile", Ref(1), (10**5, 10**5)),
    "pad": ("torch.nn.functional.pad", Ref(1), (0, 10**12)),
    "new_zeros": ("Tensor.new_zeros", Ref(1), (10**6, 10**6)),
    "fft": ("torch.fft.fft", Ref(1), 10**12),
    "block_diag": ("torch.block_diag", *[Ref(1)] * 1000),
    "repeat_interleave": ("torch.repeat_interleave", Ref(1), 10**9),
}
for _name, _call in ONE_NODE.items():
    HOSTILE[_name] = lambda document, call=_call: document.ref(*call)

SQUARES = {
    "outer": ("torch.outer", Ref(2), Ref(2)),
    "einsum": ("torch.einsum", "i,j->ij", Ref(2), Ref(2)),
    "kron": ("torch.kron", Ref(2), Ref(2)),
    "diag_embed": ("torch.diag_embed", Ref(2)),
    "diag": ("torch.diag", Ref(2)),
    "vander": ("torch.vander", Ref(2), 10**6),
    "cartesian_prod": ("torch.cartesian_prod", Ref(2), Ref(2)),
}
for _name, _call in SQUARES.items():
    HOSTILE[_name] = lambda document, call=_call: (document.million(), document.ref(*call))


@hostile
def linspace(d):
    d.ref("torch.linspace", 0, 1, steps=10**12)


@hostile
def expand_and_clone(d):
    d.ref("Tensor.clone", d.ref("Tensor.expand", d.ref("operator.getitem", d.hidden, (0, 0)), 10**6, 10**6))


@hostile
def broadcast(d):
    z = d.million()
    d.ref("operator.add", z, d.ref("Tensor.unsqueeze", z, 1))


@hostile
def one_hot(d):
    d.ref("torch.nn.functional.one_hot", d.ref("torch.zeros", 10**6, dtype=DType("int64")), 10**7)


@hostile
def cdist(d):
    z = d.ref("torch.zeros", 10**6, 2)
    d.ref("torch.cdist", z, z)


@hostile
def step_inside_of_an_operation(d):
    z = d.ref("torch.zeros", 10**4, 64)
    a, b = d.ref("Tensor.unsqueeze", z, 0), d.ref("Tensor.unsqueeze", z, 1)
    d.ref("torch.nn.functional.cosine_similarity", a, b, dim=-1)


@hostile
def cat_of_many(d):
    d.ref("torch.cat", [d.ref("torch.zeros", 10**8)] * 1000)


@hostile
def doubling(d):
    value = d.hidden
    for _ in range(60):
        value = d.ref("torch.cat", [value, value])


@hostile
def meshgrid(d):
    z = d.million()
    d.ref("torch.stack", d.ref("torch.meshgrid", z, z, indexing="ij"))


@hostile
def thousand_saves(d):
    for _ in range(1000):
        d.save(d.ref("torch.zeros", 10**7))


@hostile
def thousand_saved_copies_of_a_weight(d):
    weight = d.ref("model.parameter", "2", "weight")
    for _ in range(1100):
        d.save(weight)


@hostile
def dict_of_many(d):
    d.save(d.ref("container.dict", **{f"k{n}": d.ref("torch.zeros", 10**7) for n in range(1000)}))


@hostile
def saves_in_a_loop(d):
    start, _ = d.loop(d.ref("control.range", 0, 100_000, 1))
    d.save(d.ref("torch.zeros", 10**6, block=start.id), block=start.id)
    d.ref("control.end", start)


@hostile
def collected_in_a_loop(d):
    start, _ = d.loop(d.ref("control.range", 0, 100_000, 1))
    value = d.ref("torch.zeros", 10**6, block=start.id)
    d.save(d.ref("control.collect", d.ref("control.end", start), value))


@hostile
def appended_in_a_loop(d):
    made = d.ref("container.list")
    start, _ = d.loop(d.ref("control.range", 0, 100_000, 1))
    d.ref("container.append", made, d.ref("torch.zeros", 10**6, block=start.id), block=start.id)
    d.ref("control.end", start)
    d.save(made)


@hostile
def loop_over_something_unknown(d):
    start, _ = d.loop(d.ref("torch.nonzero", d.hidden))
    d.save(d.ref("torch.zeros", 10**7, block=start.id), block=start.id)
    d.ref("control.end", start)


@hostile
def list_of_numbers(d):
    d.ref("Tensor.tolist", d.ref("torch.zeros", 5 * 10**8))


@hostile
def branch_on_data(d):
    total = d.ref("torch.sum", d.hidden)
    branch = d.ref("control.if", d.ref("operator.gt", total, 0))
    d.ref("torch.zeros", 10**12, block=branch.id)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_graph_is_refused_with_an_estimate(name):
    """The message has the node, the line, the estimate and the budget; it takes little time and no memory."""
    document = Document()
    HOSTILE[name](document)
    check_memory(Document().graph(), X, NET, BUDGET)  # what is done once is not measured
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(InvalidGraph, match=r"node \d+ \(.*iB of memory; the budget is 4 GiB") as caught:
        check_memory(document.graph(), X, NET, BUDGET)
    assert caught.value.where == str(LINE)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 64 * MiB + 2048 * len(document.nodes)
    assert time.process_time() - begun < 2 + 0.002 * len(document.nodes)


@pytest.mark.parametrize(
    ("op", "parts"), [("torch.unbind", ()), ("torch.split", (1,)), ("torch.tensor_split", (10**8,))]
)
def test_division_into_millions_of_tensors_is_refused(op, parts):
    """A tensor of a billion numbers is not divided into as many tensors."""
    document = Document()
    document.ref(op, document.ref("torch.zeros", 10**8), *parts)
    with pytest.raises(ExecutionFailed, match="would make 100000000 tensors"):
        check_memory(document.graph(), X, NET, BUDGET)


def test_model_that_is_too_large_for_its_inputs_is_refused():
    """The largest output of the model counts, as far as the forward goes."""
    many = {"x": torch.zeros(1, 64).expand(300_000, 64)}
    document = Document()
    with pytest.raises(InvalidGraph, match=r"node 0 \(model\.forward\)"):
        check_memory(document.graph(), many, NET, 1 << 30)
    assert check_memory(document.graph(), many, NET, BUDGET).estimate > 300_000 * 1024 * 4


def _chain(length, size):
    document = Document()
    value = document.ref("torch.zeros", size)
    for _ in range(length):
        value = document.ref("operator.add", value, 1.0)
    document.save(value)
    return document


def test_chain_holds_two_values_at_a_time():
    """Values are dropped after their last use: a chain of 100 is estimated at two of them, not at a hundred."""
    guard = check_memory(_chain(100, 10 * MiB).graph(), X, NET)
    assert 2 * 40 * MiB <= guard.estimate <= 2.1 * 40 * MiB


def test_views_take_nothing():
    """A view shares its memory; a thousand of them are free."""
    document = Document()
    z = document.ref("torch.zeros", 10 * MiB)
    for _ in range(1000):
        document.ref("Tensor.expand", document.ref("Tensor.view", z, 1, -1), 1000, -1)
    assert check_memory(document.graph(), X, NET).estimate < 1.1 * 40 * MiB


def test_backward_holds_everything_before_it():
    """What a backward pass may need is not dropped before it."""
    document = _chain(20, 10 * MiB)
    without = check_memory(document.graph(), X, NET).estimate
    document.ref("grad.backward", document.ref("torch.sum", Ref(len(document.nodes) - 2)))
    assert check_memory(document.graph(), X, NET).estimate > 8 * without


@pytest.mark.parametrize("what", ["chain", "saves", "outer"])
def test_estimate_is_near_the_measured_peak(what):
    """Estimated and measured memory of a run differ by less than a factor of 1.5."""
    document = Document()
    if what == "chain":
        document = _chain(10, 40 * MiB)
    elif what == "saves":
        for _ in range(8):
            document.save(document.ref("torch.ones", 10 * MiB))
    else:
        z = document.ref("torch.ones", 8192)
        document.save(document.ref("torch.sum", document.ref("torch.exp", document.ref("torch.outer", z, z))))
    estimate = check_memory(document.graph(), X, NET).estimate
    run_graph(Document().graph(), X, NET)  # what is done once is not measured
    assert 1 / 1.5 < estimate / peak_of(lambda: run_graph(document.graph(), X, NET)) < 1.5


def test_same_program_on_other_inputs_of_the_same_shape_is_checked_once():
    """The check is kept by structure and shapes: a second prompt runs no fake operation; another shape does."""
    document, seen = Document(), []
    document.save(document.ref("operator.mul", document.hidden, 2))
    mode = twin_of(NET).mode
    for x in (torch.zeros(5, 64), torch.ones(5, 64), torch.ones(6, 64)):
        mode.largest = -1
        guard = check_memory(document.graph(), {"x": x}, NET)
        seen.append((mode.largest == -1, guard.estimate))
    assert [kept for kept, _ in seen] == [False, True, False]
    assert seen[0][1] == seen[1][1] < seen[2][1]


def test_numbers_of_different_types_are_different_programs():
    """``x * 2`` and ``x * 2.0`` on integers differ in dtype, and are not confused."""
    estimates = []
    for factor in (2, 2.0):
        document = Document()
        document.save(document.ref("operator.mul", document.ref("torch.zeros", MiB, dtype=DType("int8")), factor))
        estimates.append(check_memory(document.graph(), X, NET).estimate)
    assert estimates[1] - estimates[0] == 3 * MiB


def test_smaller_budget_refuses_what_was_let_pass():
    """A kept estimate is held against the budget of each request."""
    graph = _chain(3, MiB).graph()
    assert check_memory(graph, X, NET, BUDGET).budget == BUDGET
    with pytest.raises(InvalidGraph, match="the budget is 1 MiB"):
        check_memory(graph, X, NET, MiB)


def test_wrong_shape_is_found_before_the_run():
    """What cannot work is refused with the user's line and the exception's own type."""
    document = Document()
    document.ref("operator.getitem", document.hidden, 99)
    with pytest.raises(IndexError) as caught:
        check_memory(document.graph(), X, NET)
    assert str(caught.value).startswith(str(LINE))


def test_forward_that_fails_on_fakes_is_left_to_the_run():
    """The check never refuses a graph because the model itself did not run on fake tensors."""
    document = Document()
    document.save(document.hidden)
    guard = check_memory(document.graph(), {"x": torch.zeros(8, 63)}, NET)
    assert guard.estimate == 8 * 63 * 4


DATA_DEPENDENT = {
    "nonzero": lambda d: d.ref("torch.nonzero", d.ref("Tensor.expand", d.ref("torch.ones", 1), 10**9)),
    "zeros": lambda d: d.ref("torch.zeros", d.ref("Tensor.item", d.ref("torch.full", (), 10**11))),
    "repeat_interleave": lambda d: d.ref(
        "torch.repeat_interleave", d.ref("torch.ones", 2), d.ref("torch.full", (2,), 10**11)
    ),
    "by_name": lambda d: d.ref("torch.repeat_interleave", repeats=d.ref("torch.full", (2,), 10**11)),
    "one_hot": lambda d: d.ref("torch.nn.functional.one_hot", d.ref("torch.full", (100,), 10**9)),
    "bincount": lambda d: d.ref("torch.bincount", d.ref("torch.full", (1,), 10**11)),
}


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_size_that_depends_on_data_is_checked_before_the_allocation(name):
    """What no estimate could know is found out from the data in the run, and refused before memory is taken."""
    document = Document()
    node = DATA_DEPENDENT[name](document)
    guard = check_memory(document.graph(), X, NET, BUDGET)
    assert node.id in guard.unchecked
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidGraph, match=rf"node {node.id} .*the budget is [\d.]+ GiB[\s\S]*depends on data"):
        run_graph(document.graph(), X, NET, guard=guard)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 256 * MiB


def test_data_dependent_sizes_that_fit_run():
    """Masks, positions and counts of ordinary size run under the guard, and give what torch gives."""
    document = Document()
    x = document.ref("operator.add", document.hidden, 1.0)
    mask = document.ref("operator.gt", x, 0.5)
    document.save(document.ref("operator.getitem", x, mask))
    document.save(document.ref("torch.nonzero", mask))
    guard = check_memory(document.graph(), X, NET, BUDGET)
    got = run_graph(document.graph(), X, NET, guard=guard)
    value = NET[1](NET[0](X["x"])) + 1.0
    assert torch.equal(got["s0"], value[value > 0.5])
    assert torch.equal(got["s1"], (value > 0.5).nonzero())


def test_loop_that_grows_is_checked_at_each_pass():
    """A variable that doubles at each pass of a loop is stopped before it exceeds the budget."""
    document = Document()
    start, _ = document.loop(document.ref("control.range", 0, 15, 1))
    carried = document.ref("control.carried", start, document.hidden, block=start.id)
    doubled = document.ref("torch.cat", [carried, carried], block=start.id)
    document.ref("control.next", carried, doubled, block=start.id)
    document.ref("control.end", start)
    guard = check_memory(document.graph(), X, NET, 256 * MiB)
    assert doubled.id in guard.unchecked
    with pytest.raises(InvalidGraph, match="the budget is 256 MiB"):
        run_graph(document.graph(), X, NET, guard=guard)


def test_guard_of_a_part_has_its_numbers():
    """Within a part of a graph with numbers of its own, the same nodes are checked."""
    document = Document()
    node = document.ref("torch.nonzero", document.hidden)
    guard = check_memory(document.graph(), X, NET)
    assert guard.unchecked == {node.id}
    assert guard.within({node.id: 40, 0: 41}).unchecked == {40}


def test_budget_is_less_than_the_machine_has(monkeypatch):
    """Without a budget a share of what is free counts; of a Slurm job no more than what it was given."""
    free = memory_budget(torch.device("cpu"))
    assert 0 < free < torch.iinfo(torch.int64).max
    monkeypatch.setenv("SLURM_MEM_PER_NODE", str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) + 512))
    assert memory_budget(torch.device("cpu")) <= min(free, 0.8 * 2048 * MiB)


@pytest.mark.parametrize(("bytes_", "expected"), [(17, "17 B"), (4096, "4 KiB"), (4 * 10**12, "3.64 TiB")])
def test_bytes_in_words(bytes_, expected):
    """Bytes are told in powers of 1024."""
    assert expected == in_words(bytes_)
