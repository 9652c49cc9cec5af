"""How much a request may return: counted before it is packed, written or said, in the worker's own words."""

from __future__ import annotations

import pytest
import torch

from nnsight_hpc.execution.values import save_tensors, unpack_values
from nnsight_hpc.graph import GraphBuilder, Ref, Source
from nnsight_hpc.models import wrap
from nnsight_hpc.slurm.worker.allowance import Allowance
from nnsight_hpc.slurm.worker.control import Control
from nnsight_hpc.slurm.worker.loop import Runner
from nnsight_hpc.slurm.worker.model import Alone
from nnsight_hpc.wire.errors import ErrorReport
from nnsight_hpc.wire.frames import pack
from nnsight_hpc.wire.messages import ModelIdentity
from nnsight_hpc.wire.workers import Lease, Outcome


def _zeros(builder, count):
    return Ref(builder.add("torch.zeros", count))


def _saved(builder, value, line):
    return builder.add("save", value, source=Source("x.py", line, "….save()"))


def run(folder, builder, saves, limit) -> tuple[Outcome, list[str]]:
    """The outcome of a graph in a worker's loop whose lease allows `limit` bytes, and what the graph has said."""
    request = folder / "r.request"
    graph = builder.build(saves, ModelIdentity(id="m"))
    request.write_bytes(pack(graph.to_json().encode(), save_tensors({})))
    lease = Lease(id="r", kind="run", attempt=1, request=str(request), result="", user="me", result_bytes=limit)
    said = []
    runner = Runner(Alone(wrap(torch.nn.Linear(2, 2))), Control("w1"), None)
    [[(_, outcome)]] = runner.run([lease], folder, lambda _request, text, _source: said.append(text))
    return outcome, said


def test_a_result_is_as_large_as_it_may_be_and_not_a_byte_larger(tmp_path):
    """The limit is on the bytes that are sent: what fits exactly is written, one byte less is refused."""
    builder = GraphBuilder()
    saves = {"value": _saved(builder, _zeros(builder, 100), 3)}
    free, _ = run(tmp_path, builder, saves, None)
    exact, _ = run(tmp_path, builder, saves, free.result_bytes)
    assert (exact.error, exact.result_bytes) == (None, free.result_bytes)
    assert unpack_values(exact.result)["value"].shape == (100,)
    less, _ = run(tmp_path, builder, saves, free.result_bytes - 1)
    assert less.error.kind == "Denied"
    assert less.result == b""


def test_the_largest_values_are_named_with_the_line_of_the_first(tmp_path):
    """Sizes are those of the tensors, however they are nested; the line is where the largest is saved."""
    builder = GraphBuilder()
    small, large = _zeros(builder, 10), _zeros(builder, 1000)
    held = Ref(builder.add("container.list", small, large))
    saves = {"small": _saved(builder, small, 3), "held": _saved(builder, held, 4)}
    outcome, _ = run(tmp_path, builder, saves, 500)
    assert outcome.error.what == "the request returns more than its pool's policy allows: 500 bytes"
    assert outcome.error.where == "x.py:4: ….save()"
    assert outcome.error.why == "it would return 4080 bytes\nheld: 4040 bytes\nsmall: 40 bytes"


def test_numbers_and_texts_count_as_well_as_tensors(tmp_path):
    """A list of numbers is no tensor, and is refused by the size of what would be sent."""
    builder = GraphBuilder()
    numbers = Ref(builder.add("Tensor.tolist", _zeros(builder, 5000)))
    outcome, _ = run(tmp_path, builder, {"numbers": _saved(builder, numbers, 3)}, 10_000)
    assert outcome.error.kind == "Denied"


def test_what_is_said_is_returned(tmp_path):
    """Lines count, too: the one that is too much is not said, and what was said is missing from the result's share."""
    builder = GraphBuilder()
    for _ in range(5):
        builder.add("log", "x" * 100, source=Source("x.py", 7, "log(…)"))
    outcome, said = run(tmp_path, builder, {}, 450)
    assert (outcome.error.where, said) == ("x.py:7: log(…)", ["x" * 100] * 4)
    assert "500 bytes of what it said" in outcome.error.why
    value = {"value": _saved(builder, _zeros(builder, 100), 3)}
    alone, _ = run(tmp_path, builder, value, None)
    both, _ = run(tmp_path, builder, value, alone.result_bytes + 499)
    assert both.error.kind == "Denied"
    assert run(tmp_path, builder, value, alone.result_bytes + 500)[0].error is None


@pytest.mark.parametrize("limit", [None, 1, 5000])
def test_the_words_of_an_error_are_no_way_around(limit):
    """Values can stand in an assertion's message: no more is shown than may be returned, but for a few sentences."""
    report = ErrorReport("ExecutionFailed", "a" * 20_000, "x.py:3", "b" * 20_000)
    cut = Allowance(limit).cut(report)
    expected = {None: 20_000, 1: 1000, 5000: 5000}[limit]
    assert (len(cut.what), len(cut.why), cut.where) == (expected, expected, "x.py:3")
