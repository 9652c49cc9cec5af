"""The slices of a dump among many workers, which die, stall, wake and come back, in a simulation without processes."""

import random
import sys
from collections import Counter

import pytest

from nnsight_hpc.storage.slice_queue import SliceQueue
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import DumpProgress
from nnsight_hpc.wire.workers import SliceProgress, SlicesOpened

TOKENS = 10
"""Of each slice; a document, two bytes a token."""


def opened(slices, written=()):
    done = len(written)
    totals = {"documents_total": slices, "tokens_total": slices * TOKENS, "bytes_total": slices * 2 * TOKENS}
    counts = {"documents": done, "tokens": done * TOKENS, "bytes": done * 2 * TOKENS}
    return SlicesOpened(slices=slices, written=tuple(written), progress=DumpProgress(**totals, **counts))


def part_of(number, tokens=TOKENS, **more):
    return SliceProgress(slice=number, documents=tokens // TOKENS, tokens=tokens, bytes=2 * tokens, **more)


def test_slices_are_given_in_their_order_and_each_once():
    """Two workers share what is not written; when none waits, there is none to give."""
    queue = SliceQueue(opened(5, written=[1]))
    assert [queue.next(worker) for worker in ("a", "b", "c", "d", "e")] == [0, 2, 3, 4, None]
    assert (queue.waiting, queue.written, queue.complete) == (0, 1, False)


def test_who_asks_again_gets_the_same():
    """The answer was lost on the way: nothing is held twice."""
    queue = SliceQueue(opened(3))
    assert [queue.next("a"), queue.next("a")] == [0, 0]
    queue.wrote(part_of(0))
    queue.wrote(part_of(0))
    assert (queue.next("a"), queue.written) == (1, 1)
    assert queue.progress().tokens == TOKENS


def test_what_is_given_back_waits_behind_all_others_and_may_be_kept_by_who_began_it():
    """A worker that paused goes on with its slice, unless somebody else has it by then."""
    queue = SliceQueue(opened(3))
    assert [queue.next("a"), queue.next("b")] == [0, 1]
    queue.give_back("a")
    assert queue.next("a", begun=0) == 0
    queue.give_back("a")
    assert [queue.next("c"), queue.next("d"), queue.next("a", begun=0)] == [2, 0, None]


def test_progress_counts_what_is_written_of_unfinished_slices():
    """All workers' rows and speeds are summed; a slice that is given back counts no more."""
    queue = SliceQueue(opened(4, written=[3]))
    queue.next("a")
    queue.next("b")
    queue.report("a", part_of(0, 4, speed=2.0))
    queue.report("b", part_of(1, 6, speed=3.0))
    assert queue.progress() == DumpProgress(
        documents=1, documents_total=4, tokens=20, tokens_total=40, bytes=40, bytes_total=80, speed=5.0, workers=2
    )
    queue.give_back("b")
    assert (queue.progress().tokens, queue.progress().speed) == (14, 2.0)


def test_a_new_queue_learns_who_is_at_work_from_their_reports():
    """After the daemon's end, a worker that says how far it is has its slice, and nobody else is given it."""
    queue = SliceQueue(opened(3, written=[0]))
    queue.report("a", part_of(1, 4))
    assert [queue.next("b"), queue.next("a")] == [2, 1]
    queue.report("c", part_of(1, 2))  # taken for dead, and awake again: the slice is another's now
    assert set(queue.doing()) == {"a", "b"}


def test_what_an_unknown_worker_wrote_counts():
    """A slice on disk is written, whoever was to write it; overflows and padding are summed once."""
    queue = SliceQueue(opened(2))
    queue.next("a")
    for _ in range(2):
        queue.wrote(part_of(0, overflows={"x": 3}, run_tokens=30, padded_tokens=40))
    assert (queue.next("a"), dict(queue.overflows), queue.padding) == (1, {"x": 3}, 0.25)
    queue.wrote(part_of(1, run_tokens=30, padded_tokens=60))
    assert queue.padding == 0.4


def test_another_dataset_is_refused():
    """Who has found another number of slices, or names one that there is not, writes something else."""
    queue = SliceQueue(opened(2))
    with pytest.raises(InvalidInput, match="3 slices"):
        queue.open(opened(3))
    with pytest.raises(InvalidInput, match="no slice 2"):
        queue.wrote(part_of(2))


class _Simulation:
    """Workers with a clock each; the daemon is replaced at times, and takes silent ones for dead.

    `disk` has the slices that are committed, `begun` counts beginnings of each, `excuses` what may cause work in vain.
    """

    def __init__(self, workers: int, slices: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.slices, self.disk = slices, set[int]()
        self.queue = SliceQueue(opened(slices))
        self.works: dict[str, int | None] = {f"w{number}": None for number in range(workers)}
        self.told: dict[str, int] = {}
        self.begun, self.excuses = Counter[int](), 0

    def run(self) -> None:
        names = list(self.works)
        for _ in range(400 * self.slices):
            if self.queue.complete:
                return
            self.step(self.chance.choice(names))
        raise AssertionError(f"{self.queue.waiting} slices wait, {self.queue.doing()}")

    def step(self, name: str) -> None:
        number, luck = self.works[name], self.chance.random()
        if number is None:
            self.ask(name)
        elif luck < 0.02:  # it dies, and the daemon hears of it
            self.works[name] = None
            self.queue.give_back(name)
            self.excuses += 1
        elif luck < 0.04:  # it stalls and is taken for dead; later it goes on as if nothing had been
            self.queue.give_back(name)
            self.excuses += 1
        elif luck < 0.041:
            self.new_daemon()
        elif luck < 0.4:
            self.queue.report(name, part_of(number, self.chance.randrange(TOKENS)))
        else:
            self.disk.add(number)
            self.works[name], self.told[name] = None, number

    def ask(self, name: str) -> None:
        if (written := self.told.pop(name, None)) is not None:
            self.queue.wrote(part_of(written))
        given = self.queue.next(name)
        if self.chance.random() < 0.05:  # the answer is lost
            return
        if given is not None and given in self.disk:
            self.told[name] = given
        elif given is not None:
            self.works[name] = given
            self.begun[given] += 1

    def new_daemon(self) -> None:
        """It knows what is on disk, and hears of some who are at work before others ask."""
        self.queue = SliceQueue(opened(self.slices, sorted(self.disk)))
        at_work = [(name, number) for name, number in self.works.items() if number is not None]
        self.chance.shuffle(at_work)
        for name, number in at_work[: len(at_work) // 2]:
            self.queue.report(name, part_of(number, 1))
        self.excuses += len(at_work) - len(at_work) // 2


@pytest.mark.parametrize("seed", range(5))
def test_a_thousand_workers_write_each_slice(seed):
    """Whatever happens to them, every slice is written in the end, and work is in vain only where one was lost or unknown."""
    simulation = _Simulation(1000, 1500, seed)
    simulation.run()
    assert simulation.disk == set(range(1500))
    progress = simulation.queue.progress()
    assert (progress.tokens, progress.documents, progress.workers) == (1500 * TOKENS, 1500, 0)
    assert simulation.begun.total() - 1500 <= simulation.excuses


def _instructions(work) -> int:
    """How many instructions of Python `work` takes."""
    count = 0

    def step(frame, event, _argument):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_what_a_call_costs_does_not_grow_with_the_workers():
    """With a thousand workers at work each operation takes as many instructions as with ten."""

    def costs(workers: int) -> list[int]:
        queue = SliceQueue(opened(3 * workers))
        for number in range(workers):
            queue.next(f"w{number}")
        return [
            _instructions(lambda: queue.report("w5", part_of(5, 3))),
            _instructions(lambda: queue.wrote(part_of(5))),
            _instructions(lambda: queue.next("w5")),
            _instructions(lambda: queue.give_back("w7")),
            _instructions(lambda: queue.next("w7", begun=7)),
        ]

    assert costs(1000) == costs(10)
