"""Requests that a worker is given together: one forward, and each with its own outcome, result and log."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from nnsight_hpc.execution.values import unpack_values
from nnsight_hpc.models import Loaded
from nnsight_hpc.slurm.worker.control import Control
from nnsight_hpc.slurm.worker.loop import Runner
from nnsight_hpc.slurm.worker.model import Alone
from nnsight_hpc.slurm.worker.room import Room
from nnsight_hpc.wire.errors import ExecutionFailed, ReplicaFailed
from nnsight_hpc.wire.messages import ModelIdentity
from nnsight_hpc.wire.workers import Lease, Orders
from tests.oracle.architectures import bare
from tests.slurm.worker.graphs import capture_frame, talking_frame
from tests.slurm.worker.stand_in import wait_for

LAYERS = [f"model.layers.{number}" for number in range(3)]
SHARED = re.compile(r"(\d+) requests shared a forward")


def _shared(bench, before=""):
    """How many requests shared each forward since the log was `before`."""
    return [int(number) for number in SHARED.findall(bench.log()[len(before) :])]


def test_each_gets_its_own_result_of_one_forward(resident):
    """What requests save in a forward that they share is what each saves alone."""
    before, daemon = resident.log(), resident.daemon
    alone = [daemon.submit(capture_frame(point)) for point in LAYERS]
    assert [daemon.outcome(request).error for request in alone] == [None] * 3
    together = daemon.submit_together([capture_frame(point) for point in LAYERS])
    outcomes = [daemon.outcome(request) for request in together]
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert len({outcome.seconds for outcome in outcomes}) == 1  # each its share
    assert _shared(resident, before) == [3]
    for one, other in zip(alone, together, strict=True):
        expected, got = (unpack_values(daemon.result(request))["hidden"] for request in (one, other))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_an_error_in_one_is_told_to_it_alone(resident):
    """A request that cannot run gets the error that it gets alone; the others share a forward."""
    before, daemon = resident.log(), resident.daemon
    frames = [capture_frame(LAYERS[0]), capture_frame("model.layers.9"), capture_frame(LAYERS[2])]
    first, wrong, last = map(daemon.outcome, daemon.submit_together(frames))
    assert (first.error, last.error) == (None, None)
    assert "model.layers.9" in wrong.error.what
    assert daemon.outcome(daemon.submit(frames[1])).error == wrong.error
    assert _shared(resident, before) == [2]


def test_a_cancelled_one_is_cancelled_and_the_others_are_done(resident):
    """An order to cancel ends one of those that share a forward, and no other."""
    before, daemon = resident.log(), resident.daemon
    asked, daemon.orders = daemon.asked_for_orders, Orders(cancel=("r-unwanted",))
    wait_for(lambda: daemon.asked_for_orders > asked + 1, "a worker that has heard the order")
    daemon.submit_together([capture_frame(point) for point in LAYERS], "r-first", "r-unwanted", "r-last")
    outcomes = [daemon.outcome(request) for request in ("r-first", "r-unwanted", "r-last")]
    daemon.orders = Orders()
    assert [outcome.cancelled for outcome in outcomes] == [False, True, False]
    assert [outcome.error for outcome in outcomes] == [None] * 3
    assert _shared(resident, before) in ([3], [2])  # it may be cancelled while it is still looked through


def test_each_says_its_own_lines_once(resident):
    """What a graph says in a shared forward is in its own log, once, and there before its outcome is."""
    daemon = resident.daemon
    requests = daemon.submit_together([talking_frame(line="one"), talking_frame(line="two")])
    assert [daemon.outcome(request).error for request in requests] == [None, None]
    said = [[line.text.split()[:3] for line in daemon.lines(request)] for request in requests]
    assert said == [[["mean", "0", "one"]], [["mean", "0", "two"]]]


def test_what_cannot_share_runs_all_the_same(resident):
    """A request with two forwards that was given with others runs alone, after them."""
    before, daemon = resident.log(), resident.daemon
    requests = daemon.submit_together([capture_frame(), capture_frame(forwards=2), capture_frame()])
    assert [daemon.outcome(request).error for request in requests] == [None] * 3
    assert _shared(resident, before) == [2]


def test_room_follows_the_memory_that_tokens_take():
    """As many tokens as the budget has memory for, from a least to a most."""
    room = Room()
    room.took(100, memory=1 << 20, budget=10 << 20)
    assert room.tokens == 1000
    room.took(100, memory=1 << 30, budget=1 << 20)
    assert room.tokens == 256
    room.took(100, memory=1, budget=1 << 40)
    assert room.tokens == 4096


def test_room_shrinks_when_memory_runs_out_and_grows_again():
    """Half the tokens after a forward that was too large, and a little more after each that was not."""
    room, roomy = Room(), functools.partial(dict, memory=1, budget=1 << 40)
    room.was_too_small()
    assert room.tokens == 2048
    room.took(100, **roomy())
    assert room.tokens == 2304
    for _ in range(10):
        room.took(100, **roomy())
    assert room.tokens == 4096


class Failing(Alone):
    """A model whose shared forwards end with an error for all, as those of several ranks may."""

    def __init__(self, error):
        super().__init__(Loaded(bare("llama"), None, ModelIdentity(id="tiny")))
        self.error = error

    def run_together(self, _members):
        raise self.error


@pytest.fixture
def leases(tmp_path):
    """Three requests that may share a forward."""
    given = [Lease(f"r{n}", "run", 1, str(tmp_path / f"r{n}"), "", "ada") for n in range(3)]
    for lease, point in zip(given, LAYERS, strict=True):
        (tmp_path / lease.id).write_bytes(capture_frame(point))
    return given


def _ended(runner, leases, folder):
    return [each for ended in runner.run(leases, folder, lambda *_: None) for each in ended]


def test_a_replica_that_cannot_go_on_gives_all_back(leases, tmp_path):
    """Where a rank fails for good in a shared forward nothing more runs there, and no request is blamed."""
    control, error = Control("w1"), ReplicaFailed("a GPU does not work any more")
    ended = _ended(Runner(Failing(error), control, None), leases, tmp_path)
    assert [outcome for _, outcome in ended] == [None] * 3
    assert control.failure is error


def test_a_rank_without_memory_has_fewer_share_the_next(leases, tmp_path):
    """All run alone then, and half as many tokens are asked for."""
    error = ExecutionFailed("not enough memory", exception="MemoryError")
    runner = Runner(Failing(error), Control("w1"), None)
    before = runner.room.tokens
    assert [outcome.error for _, outcome in _ended(runner, leases, tmp_path)] == [None] * 3
    assert runner.room.tokens == before // 2
