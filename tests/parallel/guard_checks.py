"""Faults on some ranks, at places chosen by a seed: all ranks learn of them at once, and the next request is as before."""

from __future__ import annotations

import gc
import os
import random
import sys
import weakref
from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from nnsight_hpc.parallel import Stop, Word
from nnsight_hpc.wire.errors import ExecutionFailed, HpcError, ReplicaFailed, RequestCancelled, execution_error
from tests.parallel.collective_checks import made
from tests.parallel.torch_checks import Mlp

FAULTS = int(os.environ.get("NNH_FAULTS", "20"))
LAYERS = 4


@cache
def model(world):
    """A small tensor-parallel model: two collectives a layer forward and backward, in groups of a mesh where that goes."""
    shape = (2, 2) if world.size == 4 else (1, world.size)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard"))["shard"]
    torch.manual_seed(0)
    layers = nn.Sequential(*[Mlp() for _ in range(LAYERS)])
    plan = {
        f"{n}.{name}": style
        for n in range(LAYERS)
        for name, style in (("up", ColwiseParallel()), ("down", RowwiseParallel()))
    }
    return parallelize_module(layers, mesh, plan)


def request(rank, faults=()):
    """A forward and backward of the model, reductions over all ranks between; `faults` are (place, what raises)."""
    layers, faults = model(rank.world), dict(faults)
    x = made(30, 0, (3, 8), torch.float32).requires_grad_()
    y, sums = x, []
    for number, layer in enumerate(layers):
        faults.get(("before", number), nothing)()
        y = y + layer(y)
        faults.get(("after", number), nothing)()
        backward = faults.get(("backward", number))
        if backward:
            y.register_hook(lambda _, fail=backward: fail())
        total = y.detach().clone()
        dist.all_reduce(total)
        sums.append(total)
    y.pow(2).sum().backward()
    faults.get(("end", 0), nothing)()
    return torch.stack(sums), x.grad


PLACES = [(when, number) for when in ("before", "after", "backward") for number in range(LAYERS)] + [("end", 0)]


def nothing():
    return None


def raise_an_error():
    raise KeyError("a fault")


def run_out_of_memory():
    torch.empty(2**50)


def run_out_of_memory_in_a_collective():
    """A tensor that takes no memory until it is made contiguous for MPI."""
    dist.all_reduce(torch.zeros(1).expand(2**50))


KINDS = {
    raise_an_error: "a fault",
    run_out_of_memory: "DefaultCPUAllocator",
    run_out_of_memory_in_a_collective: "DefaultCPUAllocator",
}


def failure(rank, function, stop=None):
    """The error that a request ends with on this rank."""
    rank.world.comm.Barrier()
    try:
        rank.guard.run(function, stop)
    except HpcError as error:
        return error
    raise AssertionError("the request did not fail")


def assert_healthy(rank):
    """A request gives, bit for bit, what it gave before any fault."""
    for now, before in zip(rank.guard.run(lambda: request(rank)), healthy(rank), strict=True):
        assert torch.equal(before, now)


def healthy(rank):
    if not rank.healthy:
        rank.healthy = rank.guard.run(lambda: request(rank))
    return rank.healthy


def assert_same_everywhere(rank, error):
    """All ranks raise the same error, to the letter."""
    texts = rank.world.comm.allgather((type(error).__name__, str(error)))
    assert len(set(texts)) == 1, texts


def check_faults_at_random_places(rank):
    """One, some or all ranks fail at random places: all get an error that names them; the next request is as before."""
    chance = random.Random(rank.world.size)
    healthy(rank)
    for number in range(FAULTS):
        failing = chance.sample(range(rank.world.size), chance.choice((1, 1, 2, rank.world.size)))
        kinds = {one: (chance.choice(PLACES), chance.choice([*KINDS])) for one in failing}
        mine = [kinds[rank.world.rank]] if rank.world.rank in kinds else []
        error = failure(rank, lambda mine=mine: request(rank, mine))
        assert any(text in str(error) for text in {KINDS[kind] for _, kind in kinds.values()}), (number, str(error))
        assert_same_everywhere(rank, error)
        assert_healthy(rank)


def check_the_failed_rank_is_named(rank):
    """The error of one rank says which it was, on which node, of how many."""
    last, size = rank.world.size - 1, rank.world.size
    faults = [(("after", 1), raise_an_error)] if rank.world.rank == last else []
    error = failure(rank, lambda: request(rank, faults))
    assert isinstance(error, ExecutionFailed)
    assert f"rank {last} on {rank.world.node} (of {size} ranks)" in str(error)
    assert "KeyError" in str(error)


def check_an_error_of_all_ranks_is_told_once(rank):
    """When all ranks fail alike (a user's mistake), the error is what one process would raise, line and type and all."""

    def mistake():
        raise execution_error("IndexError")(
            "IndexError: too far", where="notebook.py:3", why="in x[9]", exception="IndexError"
        )

    error = failure(rank, mistake)
    assert isinstance(error, IndexError)
    assert str(error) == "notebook.py:3\n  IndexError: too far\n  in x[9]"


def check_different_errors_are_all_told(rank):
    """When ranks fail differently, the error is the first one's, with what the others say."""

    def fail():
        raise ValueError(f"by {rank.world.rank}")

    error = failure(rank, fail)
    assert error.what == "ValueError: by 0"
    assert all(f"by {other}" in error.why for other in range(1, rank.world.size))


def check_a_failure_in_backward_is_seen_through_autograd(rank):
    """A peer's failure comes out of backward wrapped by C++, and is still known for what it is."""
    faults = [(("backward", 2), raise_an_error)] if rank.world.rank == 1 else []
    error = failure(rank, lambda: request(rank, faults))
    assert error.what == "KeyError: 'a fault'"
    assert f"rank 1 on {rank.world.node}" in error.why
    assert_healthy(rank)


def check_a_swallowed_failure_is_still_one(rank):
    """Code that catches every exception cannot go on alone: the request fails on all ranks."""

    def stubborn():
        if rank.world.rank == 1:
            raise_an_error()
        for _ in range(3):
            try:
                dist.all_reduce(torch.ones(1))
            except Exception:  # noqa: BLE001
                continue
        return "done"

    error = failure(rank, stubborn)
    assert error.what == "KeyError: 'a fault'"
    assert_healthy(rank)


def check_a_caught_error_is_none(rank):
    """An error that a rank's own code catches between collectives is nobody's business."""

    def careful():
        try:
            raise_an_error()
        except KeyError:
            return request(rank)

    assert torch.equal(healthy(rank)[0], rank.guard.run(careful)[0])


def check_cancelling_from_any_rank_at_any_word(rank):
    """A request that one rank cancels ends on all, at that word, as cancelled."""
    chance = random.Random(7)
    for _ in range(5):
        who, after = chance.randrange(rank.world.size), chance.randrange(12)
        asked = []

        def stop(asked=asked, after=after):
            asked.append(1)
            return Stop(Word.CANCELLED, RequestCancelled("somebody cancelled it")) if len(asked) > after else None

        error = failure(rank, lambda: request(rank), stop if rank.world.rank == who else None)
        assert isinstance(error, RequestCancelled)
        assert str(error) == "somebody cancelled it"
        assert len(asked) == (after + 1 if rank.world.rank == who else 0)
        assert_healthy(rank)


def check_a_time_limit_ends_the_request_at_the_next_word(rank):
    """A time limit on one rank ends all of them at the first word after it."""
    limit, words = Stop(Word.TIME_LIMIT, HpcError("it took longer than 0.3 s")), []

    def endless():
        while True:
            dist.all_reduce(torch.ones(1))

    def due():
        words.append(1)
        return limit if len(words) == 50 else None

    error = failure(rank, endless, due if rank.world.rank == 0 else None)
    assert str(error) == "it took longer than 0.3 s"
    assert len(words) == (50 if rank.world.rank == 0 else 0)
    assert_healthy(rank)


def check_a_failure_counts_more_than_cancelling(rank):
    """When one rank fails while another cancels, the failure is told."""
    cancelled = Stop(Word.CANCELLED, RequestCancelled("somebody cancelled it"))

    def fail():
        if rank.world.rank == 1:
            raise_an_error()
        dist.all_reduce(torch.ones(1))

    error = failure(rank, fail, lambda: cancelled if rank.world.rank == 0 else None)
    assert error.what == "KeyError: 'a fault'"
    assert_same_everywhere(rank, error)


def check_ranks_that_do_different_things_are_stopped(rank):
    """Other shapes, other collectives, one collective more: told on all ranks, with what each was about to do."""
    me = rank.world.rank

    def other_shape():
        dist.all_reduce(torch.ones(4 + (me == 1)))

    def other_collective():
        dist.broadcast(torch.ones(4), src=0) if me == 1 else dist.all_reduce(torch.ones(4))

    def one_more():
        dist.all_reduce(torch.ones(4))
        if me == 1:
            dist.all_reduce(torch.ones(4))

    for program, theirs in (
        (other_shape, "all-reduce of 5 x 4 bytes"),
        (other_collective, "broadcast of 4 x 4 bytes"),
        (one_more, "all-reduce of 4 x 4 bytes"),
    ):
        error = failure(rank, program)
        assert error.what.startswith("the ranks do different things")
        assert f"rank 1 on {rank.world.node}: the ranks do different things: one was at {theirs}" in error.why
        assert_same_everywhere(rank, error)
        assert_healthy(rank)


def check_groups_of_all_ranks_are_told_apart(rank):
    """Two groups that all ranks are in are not mixed up: a rank that uses the other one is found out."""
    other = dist.new_group([*range(rank.world.size)])
    group = other if rank.world.rank == 1 else dist.group.WORLD
    error = failure(rank, lambda: dist.all_reduce(torch.ones(4), group=group))
    assert error.what.startswith("the ranks do different things")
    assert_healthy(rank)


def check_a_rank_that_leaves_tells_the_others(rank):
    """SystemExit on one rank is that rank's own affair, and an error for the others."""
    left = ""
    try:
        rank.guard.run(lambda: sys.exit(3) if rank.world.rank == 1 else request(rank))
    except SystemExit as leaving:
        left = f"exit {leaving.code}"
    except HpcError as error:
        left = error.what
    assert ("exit 3" if rank.world.rank == 1 else "SystemExit: 3") == left
    assert_healthy(rank)


def check_a_failed_request_keeps_no_memory(rank):
    """What the frames of a failed request held is free when the error is raised, on the failed rank and on the others."""
    alive = []

    def hold():
        activation = torch.ones(1000)
        alive.append(weakref.ref(activation))
        if rank.world.rank == 0:
            raise_an_error()
        dist.all_reduce(activation)

    gc.disable()
    try:
        error = failure(rank, hold)
        assert [one() for one in alive] == [None], error
    finally:
        gc.enable()


def check_without_a_request_there_are_no_words(rank):
    """Outside of `run` (loading, tests) collectives cost no word."""
    words = rank.guard.progress.words
    dist.all_reduce(torch.ones(1))
    assert words == rank.guard.progress.words
    rank.guard.run(lambda: dist.all_reduce(torch.ones(1)))
    assert words + 2 == rank.guard.progress.words


def check_a_rank_that_cannot_go_on_is_told_first(rank):
    """A rank that finds, as it clears up after another's failure, that it cannot go on: all learn that the replica ends."""

    def unclear():
        try:
            if rank.world.rank == 0:
                raise_an_error()
            dist.all_reduce(torch.ones(1))
        finally:
            if rank.world.rank == 1:
                raise ReplicaFailed("its weights have changed")

    error = failure(rank, unclear)
    assert isinstance(error, ReplicaFailed)
    assert error.what == "its weights have changed"
    assert "rank 0 on" in error.why
    assert "a fault" in error.why
    assert_same_everywhere(rank, error)


def check_cancelling_between_words_is_no_failure(rank):
    """One rank that finds its request cancelled while it computes ends it on all, in the words of a cancelled one."""

    def cancelled():
        if rank.world.rank == 1:
            raise RequestCancelled("somebody cancelled it")
        dist.all_reduce(torch.ones(1))

    error = failure(rank, cancelled)
    assert (type(error), str(error)) == (RequestCancelled, "somebody cancelled it")
    assert_healthy(rank)


def check_an_error_is_in_no_circle(rank):
    """What an error's frames hold is free when the error is dropped, not when Python next collects."""
    alive = []

    def hold():
        asked = type("Asked", (), {})()
        alive.append(weakref.ref(asked))
        failure(rank, lambda: [asked, raise_an_error()])

    gc.disable()
    try:
        hold()
        assert [one() for one in alive] == [None]
    finally:
        gc.enable()
