"""What requests say: kept by the daemon in files, read by people while it comes."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.daemon import request_log
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound
from nnsight_hpc.wire.messages import LogLine, RequestLog, encode
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.states import EndCause, ReplicaState, RequestState
from nnsight_hpc.wire.workers import EndRecord
from tests.daemon.process import LONG, DaemonProcess, Worker, send


def lines_of(*texts: str) -> bytes:
    return b"".join(encode(LogLine(text=text, source="x.py:3", time=1.0)) + b"\n" for text in texts)


def say(worker: Worker, lease, at: int, lines: bytes) -> None:
    path = f"/w1/log?replica={worker.replica}&id={lease.id}&attempt={lease.attempt}&at={at}"
    worker.post(path, lines)


def heard(daemon: DaemonProcess, request: str, start: int = 0, wait: float = 0, seen: str = "") -> RequestLog:
    path = f"/v1/requests/{request}/log?from={start}&wait={wait}&seen={seen}"
    return daemon.people().get(path, RequestLog, timeout=2 * LONG)


def running(daemon: DaemonProcess, worker: Worker):
    """A request that the worker runs."""
    send(daemon.people(), new_request_id())
    lease = worker.lease()
    worker.started(lease)
    return lease


# -- the file ----------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=50), max_size=30), st.data())
def test_parts_that_come_late_or_twice_make_the_same_log(tmp_path_factory, texts, data):
    """However the lines are split, and whichever part is sent again, the log is what was said, and reads in any steps."""
    path = tmp_path_factory.mktemp("log") / "log"
    ends = [len(lines_of(*texts[:count])) for count in range(len(texts) + 1)]
    whole = lines_of(*texts)
    cuts = sorted({0, len(texts), *data.draw(st.sets(st.sampled_from(range(len(texts) + 1))))})
    for first, last in itertools.pairwise(cuts):
        for _ in range(data.draw(st.integers(1, 2))):
            request_log.write(path, ends[first], whole[ends[first] : ends[last]])
    found, position, is_all = [], 0, False
    while not is_all:
        lines, position, is_all = request_log.read([path], position)
        found += [line.text for line in lines]
    assert (texts, len(whole)) == (found, position)


def test_attempts_are_one_log_and_long_ones_come_in_parts(tmp_path):
    """Positions run on from one attempt's file to the next, and no answer is larger than a part."""
    texts = [f"{number} " + "x" * 3000 for number in range(200)]
    request_log.write(tmp_path / "1", 0, lines_of(*texts[:90]))
    request_log.write(tmp_path / "2", 0, lines_of(*texts[90:]))
    found, position, answers, is_all = [], 0, 0, False
    while not is_all:
        lines, position, is_all = request_log.read([tmp_path / "1", tmp_path / "missing", tmp_path / "2"], position)
        found += [line.text for line in lines]
        answers += 1
        assert sum(len(line.text) for line in lines) <= request_log.PART
    assert (texts, 3) == (found, answers)


def test_a_line_that_was_cut_is_left_out(tmp_path):
    """What a full disk has left of a line is not shown, and does not hide what follows."""
    (tmp_path / "1").write_bytes(lines_of("one") + lines_of("two")[:10])
    (tmp_path / "2").write_bytes(lines_of("again") + lines_of("three"))
    lines, _, is_all = request_log.read([tmp_path / "1", tmp_path / "2"], 0)
    assert ([line.text for line in lines], is_all) == (["one", "three"], True)


@pytest.mark.parametrize(
    ("at", "lines", "error"),
    [
        (0, b"no JSON\n", InvalidInput),
        (0, lines_of("a")[:-1], InvalidInput),
        (0, b"", InvalidInput),
        (0, encode(LogLine(text="x" * request_log.PART)) + b"\n", InvalidInput),
        (request_log.MOST, lines_of("a"), InvalidInput),
        (1, lines_of("a"), Conflict),
    ],
)
def test_what_is_no_part_of_a_log_is_refused(tmp_path, at, lines, error):
    """Neither other bytes than lines of a log, nor more than a log may have, nor a gap."""
    with pytest.raises(error):
        request_log.write(tmp_path / "log", at, lines)
    assert not (tmp_path / "log").exists() or not (tmp_path / "log").read_bytes()


def test_a_log_that_cannot_be_written_is_a_conflict(tmp_path):
    """The worker then says no more, and goes on."""
    with pytest.raises(Conflict, match="cannot be written"):
        request_log.write(tmp_path / "missing" / "log", 0, lines_of("a"))


# -- over HTTP ---------------------------------------------------------------------------------------------------


def test_lines_are_there_while_the_request_runs(daemon, worker):
    """A long poll answers when a line comes, and again when the request ends; both say where to read on."""
    lease = running(daemon, worker)
    first = heard(daemon, lease.id)
    assert (first.lines, first.next, first.complete, first.status.state) == ((), 0, False, RequestState.RUNNING)
    polled: list[RequestLog] = []
    thread = threading.Thread(target=lambda: polled.append(heard(daemon, lease.id, 0, LONG, "RUNNING")))
    begun = time.monotonic()
    thread.start()
    time.sleep(0.3)
    say(worker, lease, 0, lines_of("one"))
    thread.join(120)
    assert time.monotonic() - begun < LONG / 2
    assert (
        [line.text for line in polled[0].lines],
        polled[0].lines[0].source,
        polled[0].status.state,
    ) == (["one"], "x.py:3", RequestState.RUNNING)
    thread = threading.Thread(target=lambda: polled.append(heard(daemon, lease.id, polled[0].next, LONG, "RUNNING")))
    thread.start()
    say(worker, lease, polled[0].next, lines_of("two"))
    thread.join(120)
    worker.finish(lease)
    last = heard(daemon, lease.id, polled[1].next, LONG, "RUNNING")
    assert ([line.text for line in polled[1].lines], polled[1].complete) == (["two"], False)
    assert (last.lines, last.complete, last.status.state) == ((), True, RequestState.COMPLETED)
    assert [line.text for line in heard(daemon, lease.id).lines] == ["one", "two"]


def test_a_log_survives_the_daemon(daemon_with):
    """After kill -9 the next daemon has what was said, and takes the rest at its place."""
    daemon = daemon_with()
    daemon.up()
    worker = daemon.worker()
    lease = running(daemon, worker)
    one, two = lines_of("one"), lines_of("two")
    say(worker, lease, 0, one)
    daemon.kill()
    daemon.start()
    worker.reconnect()
    worker.register()
    worker.report(ReplicaState.BUSY, running=(lease.id,))
    say(worker, lease, 0, one + two)  # the answer to the first was lost
    worker.finish(lease)
    log = heard(daemon, lease.id)
    assert ([line.text for line in log.lines], log.complete) == (["one", "two"], True)


def test_an_attempt_that_does_not_count_says_nothing(daemon_with):
    """A worker that was taken for lost cannot write into the log of the next; what it had said stays before it."""
    daemon = daemon_with()
    daemon.up(replicas=2)
    lost, next_one = (Worker(daemon, one.id) for one in daemon.replicas(count=2))
    for each in (lost, next_one):
        each.register()
        each.report(ReplicaState.READY)
    lease = running(daemon, lost)
    say(lost, lease, 0, lines_of("first"))
    next_one.post("/w1/end", EndRecord(replica=lost.replica, cause=EndCause.LOST))
    again = next_one.lease()
    assert (lease.id, 2) == (again.id, again.attempt)
    with pytest.raises(Conflict, match="does not count"):
        say(lost, lease, len(lines_of("first")), lines_of("late"))
    say(next_one, again, 0, lines_of("second"))
    assert [line.text for line in heard(daemon, lease.id).lines] == ["first", "second"]


@pytest.mark.parametrize("query", ["from=-1", "from=x", "wait=-2"])
def test_a_wrong_place_is_an_error(daemon, worker, query):
    """Positions and times are numbers from 0 on."""
    lease = running(daemon, worker)
    with pytest.raises(InvalidInput):
        daemon.people().call("GET", f"/v1/requests/{lease.id}/log?{query}")
    worker.finish(lease)


def test_an_unknown_request_says_nothing(daemon, worker):
    """Neither to people nor from workers."""
    with pytest.raises(NotFound):
        heard(daemon, "r-abcdefgh2345")
    with pytest.raises(NotFound):
        worker.post(f"/w1/log?replica={worker.replica}&id=r-abcdefgh2345&attempt=1&at=0", lines_of("a"))
