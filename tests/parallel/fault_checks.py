"""Faults in requests on the whole way from a program's bytes to its result, at places chosen by a seed, and real ones.

A model of the tests is loaded as a worker loads it, and `Ranks` runs what `fault_programs` traces on it.
"""

from __future__ import annotations

import gc
import inspect
import os
import random
import resource
import statistics
import threading
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import count
from pathlib import Path

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nnsight_hpc.execution.memory import local
from nnsight_hpc.execution.values import pack_values
from nnsight_hpc.models import load, module_tree
from nnsight_hpc.parallel.loading import load_parallel
from nnsight_hpc.parallel.view import ShardedView
from nnsight_hpc.slurm.worker.attempt import guard_of
from nnsight_hpc.slurm.worker.model import Member
from nnsight_hpc.slurm.worker.ranks import Ranks
from nnsight_hpc.slurm.worker.warmup import first_forward
from nnsight_hpc.wire.errors import ExecutionFailed, HpcError, InvalidGraph
from tests.oracle.hooks import hooks_of
from tests.parallel.fault_injection import CANCELLED, KINDS, LIMIT, Fault, Injector, chosen, raise_an_error
from tests.parallel.fault_programs import (
    PROGRAMS,
    TOO_LARGE,
    changed_weight,
    data_sized,
    gradient,
    source,
    too_large,
    traced,
    wrong_change,
    wrong_shape,
)
from tests.parallel.loading_checks import saved

FAULTS = int(os.environ.get("NNH_FAULTS", "20"))
FAMILY = {2: "llama", 3: "qwen2_1_kv_head", 4: "llama_2_kv_heads"}
"""At 4 ranks, heads of which two ranks each hold the same: groups of two ranks are there, too."""
_CIRCLES = 20
"""Tensors of failed requests that may wait, in all, for Python to collect what holds itself."""
_GROWTH = 64 << 20
"""Bytes by which the process may grow (heaps, and what is compiled at the first fault)."""
_LITTLE, _MUCH = 32 << 20, 4 << 30
"""Bytes that a request may need beside the model."""
_ROOM = 128 << 20
"""Bytes that a rank may have more than it has, when it is to have too little memory."""


@dataclass
class Replica:
    """A model over the ranks, the programs that are asked of it, and what they gave before any fault (on rank 0)."""

    ranks: Ranks
    injector: Injector
    folder: str
    programs: dict
    before: dict
    passed: dict

    def guard_of(self, trace, budget):
        """What is left to check in the run of a program that may take so many bytes."""
        program = self.programs[trace].program
        return guard_of(program.graph, program.tensors, self.ranks.loaded.module, budget, lambda: False)


replicas: list[Replica] = []


def replica(rank) -> Replica:
    """The model and its programs, each of which has run; made once."""
    if not replicas:
        replicas.append(build(rank, PROGRAMS))
    return replicas[0]


def build(rank, traces) -> Replica:
    folder = saved(rank, FAMILY[rank.world.size])
    loaded = load_parallel(folder, rank.world, rank.guard)
    view = ShardedView(rank.world, loaded.module, module_tree(folder))
    first_forward(loaded)
    ranks = Ranks(rank.world, rank.guard, loaded, view)
    programs = {trace: program_of(rank, folder, trace) for trace in traces}
    new = Replica(ranks, Injector(ranks, rank.guard), folder, programs, {}, {})
    for trace in traces:
        request(rank, new, trace)  # learns what is sharded
        [new.before[trace]] = request(rank, new, trace)
        new.passed[trace] = rank.world.comm.allgather({what: [*at] for what, at in new.injector.passed.items()})
    return new


def program_of(rank, folder, trace):
    """What rank 0 traces, and the error in one process."""
    return traced(plain(folder), trace) if rank.world.rank == 0 else None


@cache
def plain(folder):
    return load(folder).module


def request(rank, made, trace, faults=(), then=()):
    """What rank 0 gets for a program to which faults happen, and then for others to which none do: results, or errors."""
    made.injector.arm({fault.place: fault.kind for fault in faults if fault.rank == rank.world.rank})
    if rank.world.rank:
        made.ranks.follow()
        return [None for _ in (trace, *then)]
    with made.ranks:
        return [outcome(made, program) for program in (trace, *then)]


def outcome(made, trace):
    try:
        program = made.programs[trace].program
        return pack_values(made.ranks.run(Member(program, lambda: made.injector.asked("cancel"))))
    except BaseException as error:  # noqa: BLE001 - what else than an HpcError comes is told by who looks at it
        return error


def assert_error_of(error, faults):
    """The error is an `HpcError`, that of one of the faults."""
    assert isinstance(error, HpcError), repr(error)
    stops = {"cancel": CANCELLED, "limit": LIMIT.error.what}
    expected = [stops.get(fault.place[0]) or KINDS[fault.kind] for fault in faults]
    said = f"{error}\n{getattr(error, 'exception', '')}"
    assert any(text in said for text in expected), (said, expected)


def state(made):
    """All that a request could leave on a rank: hooks, weights, attributes, settings, threads and open files."""
    module = made.ranks.loaded.module
    tensors = blake2b()
    for tensor in (*module.parameters(), *module.buffers()):
        tensors.update(local(tensor).detach().contiguous().view(torch.uint8).numpy().tobytes())
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": [(name, *(len(getattr(part, table)) for table in tables)) for name, part in module.named_modules()],
        "forwards": hooks_of(module),
        "attributes": [(name, sorted(vars(part))) for name, part in module.named_modules()],
        "configuration": (repr(module.config), repr(module.generation_config)),
        "tensors": tensors.hexdigest(),
        "drawn": (blake2b(torch.get_rng_state().numpy().tobytes()).hexdigest(), hash(random.getstate())),
        "settings": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
        "threads": threading.active_count(),
        "files": psutil.Process().num_fds(),
        "restored": made.ranks.restore(),
    }


def held():
    """How many tensors are alive on this rank, and how many bytes they lie in."""
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}
    return len(tensors), sum(storages.values())


def check_faults_at_random_places(rank):
    """One, some or all ranks fail, or the request is stopped, anywhere: rank 0 gets one error, and all go on as before."""
    made, chance, after = replica(rank), random.Random(rank.world.size), []
    gc.collect()
    state_before, held_before = state(made), held()
    memory = psutil.Process().memory_info().rss
    for number in range(FAULTS):
        trace = PROGRAMS[number % len(PROGRAMS)]
        faults, other = chosen(chance, made.passed[trace]), chance.choice(PROGRAMS)
        error, *after_fault = request(rank, made, trace, faults, then=[trace, other])
        struck = min(filter(None, rank.world.comm.allgather(made.injector.failed)))
        with together(rank, number, trace.__name__, faults):
            assert state_before == state(made)
            if rank.world.rank == 0:
                assert_error_of(error, faults)
                assert after_fault == [made.before[trace], made.before[other]]
        after.append(made.injector.ended - struck)
        del error
    uncollected = held()
    gc.collect()
    collected, grown = held(), psutil.Process().memory_info().rss - memory
    with together(rank, uncollected, collected):
        assert held_before == collected
        assert uncollected[0] <= held_before[0] + _CIRCLES
        assert grown < _GROWTH
    if rank.world.rank == 0:
        report(after)


@contextmanager
def together(rank, *what):
    """What one rank finds wrong ends the check on all, so that none waits for it."""
    wrong = ""
    try:
        yield
    except Exception:  # noqa: BLE001 - told below
        wrong = traceback.format_exc()
    found = {number: text for number, text in enumerate(rank.world.comm.allgather(wrong)) if text}
    assert not found, "\n".join([*map(str, what), *(f"rank {number}: {text}" for number, text in found.items())])


def report(after):
    """Leave the figures where the test finds them."""
    median, most = 1000 * statistics.median(after), 1000 * max(after)
    Path(os.environ["NNH_FIGURES"]).write_text(
        f"{len(after)} faults: an error after {median:.1f} ms (median), {most:.0f} ms at most"
    )


@contextmanager
def little_memory(rank, where):
    """One rank may have little more memory than it has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if rank.world.rank == where:
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + _ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def check_memory_that_one_rank_does_not_have(rank):
    """An allocation that only one rank has no memory for is an error of all, which names the rank and the user's line."""
    made = replica(rank)
    made.programs[too_large] = program_of(rank, made.folder, too_large)
    for where in (0, rank.world.size - 1):
        with little_memory(rank, where):
            error, after = request(rank, made, too_large, then=[gradient])
        with together(rank, where):
            if rank.world.rank == 0:
                assert isinstance(error, MemoryError), error
                assert error.what == "the worker has not enough memory for this request"
                assert f"fault_programs.py:{line_of(too_large, 'clone')}: " in error.where
                assert f"allocate {4 * TOO_LARGE} bytes" in error.why
                assert f"raised by rank {where} on {rank.world.node} (of {rank.world.size} ranks)" in error.why
                assert after == made.before[gradient]


class Carried(TorchDispatchMode):
    """Notes which operations this rank carries out."""

    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, operation, _types, args=(), kwargs=None):
        self.operations.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def check_what_rank_0_refuses_in_the_run_no_rank_carries_out(rank):
    """A size that depends on data is known to all ranks at once; the others wait until rank 0 has looked at it."""
    made = replica(rank)
    made.programs[data_sized] = program_of(rank, made.folder, data_sized)
    for budget in (_LITTLE, _MUCH):
        guard = made.guard_of(data_sized, budget) if rank.world.rank == 0 else None
        with Carried() as carried:
            error = guarded(rank, made, data_sized, guard)
        with together(rank, budget):
            assert ("repeat_interleave" in carried.operations) == (budget == _MUCH)
            if rank.world.rank == 0 and budget == _LITTLE:
                assert isinstance(error, InvalidGraph), error
                assert f"fault_programs.py:{line_of(data_sized, 'repeat_interleave')}: " in error.where


def guarded(rank, made, trace, guard):
    """The error on rank 0 of a program with a guard, if there is one."""
    if rank.world.rank:
        made.ranks.follow()
        return None
    with made.ranks:
        try:
            made.ranks.run(Member(made.programs[trace].program, guard=guard))
        except HpcError as error:
            return error


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    return first + next(number for number, line in enumerate(lines) if text in line)


def check_a_mistake_of_the_user_is_told_as_in_one_process(rank):
    """What cannot work on any rank is one error, told once, with the user's line; a wrong shape, a change of a weight."""
    made = replica(rank)
    for trace, alike in ((wrong_shape, True), (changed_weight, True), (wrong_change, False)):
        made.programs[trace] = program_of(rank, made.folder, trace)
        error, after = request(rank, made, trace, then=[gradient])
        with together(rank, trace.__name__):
            if rank.world.rank == 0:
                expected = made.programs[trace].error
                where = expected.where.partition(": ")[2]
                assert isinstance(error, type(expected) if alike else ExecutionFailed), error
                assert str(error).count(where) == 1, error
                assert "rank" not in str(error), error
                assert not alike or str(error) == str(expected)
                assert after == made.before[gradient]


def interrupt():
    raise KeyboardInterrupt


def check_an_interrupt_of_rank_0(rank):
    """Ctrl-C on rank 0 in the midst of a request leaves it as such; the others are told, and all take the next request."""
    made = replica(rank)
    for place in (("word", 3), ("node", 2), ("word", len(made.passed[gradient][0]["word"]) - 2)):
        error, after = request(rank, made, gradient, [Fault(0, place, interrupt)], then=[gradient])
        with together(rank, place):
            if rank.world.rank == 0:
                assert isinstance(error, KeyboardInterrupt)
                assert after == made.before[gradient]


def check_faults_while_it_is_learnt_what_is_sharded(rank):
    """A rank that fails in the first request of a form, wherever it is, knows no less, and no more, than the others."""
    made, chance = replica(rank), random.Random(rank.world.size)
    forget(rank, made)
    request(rank, made, source)
    words = len(made.injector.passed["word"])
    for number in range(4):
        view, failing = forget(rank, made), chance.randrange(rank.world.size)
        fault = Fault(failing, ("word", chance.randrange(words)))
        if number < 2:  # when it takes note of what was learnt, after the last word
            fault = Fault(failing, ("word", words))
            if rank.world.rank == failing:
                view._learning._note = at_call(number + 1, view._learning._note, raise_an_error)
        error, after = request(rank, made, source, [fault], then=[source])
        with together(rank, number, fault):
            if rank.world.rank == 0:
                assert "KeyError: 'a fault'" in str(error)
                assert made.before[source] == after, after


def forget(rank, made):
    """Have the ranks learn anew what is sharded."""
    module, unsharded = made.ranks.loaded.module, module_tree(made.folder)
    made.ranks._part._view = rank.guard.run(lambda: ShardedView(rank.world, module, unsharded))
    return made.ranks._part._view


def at_call(number, function, instead):
    """The function, which does something else at its nth call."""
    calls = count(1)
    return lambda *args: instead() if next(calls) == number else function(*args)
