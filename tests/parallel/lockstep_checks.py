"""Rank 0 leads requests, the others follow; what each rank saw is compared over MPI afterwards."""

from __future__ import annotations

import hashlib
import os
import resource
import time
from pathlib import Path
from unittest import mock

import psutil
import torch
import torch.distributed as dist

from nnsight_hpc.parallel import Lockstep, Stop, Word
from nnsight_hpc.wire.errors import HpcError, RequestCancelled
from tests.rest import shares_at_rest


def led(rank, handler, lead):
    """Have rank 0 do `lead` with the ranks in step; what `lead` gave, on rank 0."""
    with Lockstep(rank.world, rank.guard, handler) as lockstep:
        if rank.world.rank == 0:
            return lead(lockstep)
        return lockstep.follow()


def raised_by(call):
    try:
        call()
    except HpcError as error:
        return error
    raise AssertionError("no error")


def check_every_rank_gets_the_bytes(rank):
    """Payloads from none to 33 MiB reach every rank unchanged, in order; the leader gets its own result."""
    payloads = [b"", b"x", bytes(range(256)) * 4096, b"\1" * (33 << 20)]
    seen = []

    def handler(payload):
        seen.append(hashlib.sha256(payload).hexdigest())
        return len(payload)

    lengths = led(rank, handler, lambda lockstep: [lockstep.lead(payload) for payload in payloads])
    assert rank.world.rank != 0 or [*map(len, payloads)] == lengths
    assert [hashlib.sha256(payload).hexdigest() for payload in payloads] == seen


def check_requests_run_collectives(rank):
    """The function may use the process group on all ranks."""

    def handler(payload):
        total = torch.tensor([float(payload[0])])
        dist.all_reduce(total)
        return total.item()

    totals = led(rank, handler, lambda lockstep: [lockstep.lead(bytes([n])) for n in range(50)])
    assert rank.world.rank != 0 or [float(n * rank.world.size) for n in range(50)] == totals


def check_a_failed_request_leaves_the_next_one_well(rank):
    """An error on any rank is the leader's to raise, with rank and node; followers go on."""

    def handler(payload):
        if payload[0] == rank.world.rank:
            raise ValueError(f"rank {rank.world.rank} cannot")
        tensor = torch.ones(3)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def lead(lockstep):
        for failing in range(rank.world.size):
            error = raised_by(lambda failing=failing: lockstep.lead(bytes([failing])))
            assert f"ValueError: rank {failing} cannot" == error.what
            assert f"rank {failing} on {rank.world.node}" in error.why
            assert [float(rank.world.size)] * 3 == lockstep.lead(b"\xff")

    led(rank, handler, lead)


def check_a_follower_without_memory_for_the_bytes(rank):
    """A payload for which a follower has no memory is an error, and the next one passes."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])

    def lead(lockstep):
        error = raised_by(lambda: lockstep.lead(bytes(200 << 20)))
        assert "MemoryError" in error.what
        assert f"rank {rank.world.size - 1} on" in error.why
        return lockstep.lead(b"small")

    if rank.world.rank == rank.world.size - 1:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20), limits[1]))
    try:
        assert led(rank, bytes, lead) in {b"small", None}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def check_a_request_can_be_cancelled(rank):
    """The leader's `stop` ends the request on all ranks."""

    def handler(_):
        while True:
            dist.all_reduce(torch.ones(1))

    def lead(lockstep):
        cancelled = Stop(Word.CANCELLED, RequestCancelled("cancelled"))
        due = time.monotonic() + 0.2
        error = raised_by(lambda: lockstep.lead(b"", lambda: cancelled if time.monotonic() > due else None))
        assert isinstance(error, RequestCancelled)

    led(rank, handler, lead)


def check_idle_followers_use_little_of_a_core(rank):
    """Followers that wait use under 2 % of a core."""
    followers = [psutil.Process(pid) for pid in rank.world.comm.allgather(os.getpid())[1:]]
    shares = led(rank, bytes, lambda _: shares_at_rest(followers, 0.02)) or [0.0]
    assert max(shares) < 0.02, shares


def check_a_request_after_a_pause_is_noticed_at_once(rank):
    """However long they have waited, followers look for a request every few milliseconds."""
    naps, sleep = [], time.sleep

    def noted(seconds):
        naps.append(seconds)
        sleep(seconds)

    def lead(lockstep):
        lockstep.lead(b"")
        sleep(1.0)
        lockstep.lead(b"")

    with mock.patch.object(time, "sleep", noted):
        led(rank, bytes, lead)
    assert rank.world.rank == 0 or max(naps, default=0.0) <= 0.005, max(naps)
