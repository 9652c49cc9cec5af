"""Measurements: the text that Prometheus reads, and what is counted."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from nnsight_hpc.daemon.counters import BOUNDS, Counters, Histogram, Requested
from nnsight_hpc.daemon.metrics import Family, Sample, as_text
from nnsight_hpc.daemon.table import Row
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.states import ReplicaState, RequestState
from nnsight_hpc.wire.workers import Outcome
from tests.daemon.process import send, wait_for
from tests.daemon.unix_session import HOST, unix_session

if TYPE_CHECKING:
    import requests

    from tests.daemon.process import DaemonProcess

_Q = RequestState
_OF = Requested("smol", "run")


def _read(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Prometheus' own reading: samples by name."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def _row(state: RequestState, **times: float) -> Row:
    rest = dict.fromkeys(Row.__struct_fields__)
    return Row(**{**rest, "id": "r-1", "pool": "smol", "kind": "run", "state": state, "times": times})


def _value(daemon: DaemonProcess, name: str, **labels: str) -> float:
    """The sum of the samples with these labels."""
    samples = _read(_metrics(daemon).text).get(f"nnsight_hpc_{name}", [])
    return sum(value for found, value in samples if labels.items() <= found.items())


def _metrics(daemon: DaemonProcess) -> requests.Response:
    return unix_session(daemon.lease().socket).get(f"{HOST}/metrics")


@given(st.text(st.characters(codec="utf-8")), st.floats(allow_nan=False))
def test_any_label_and_any_number_are_read_as_they_were(label, value):
    """What Prometheus' own parser reads is what was written."""
    text = as_text([Family("a", "gauge", "Said\nof \\ it.", [Sample(value, {"pool": label, "state": "b"})])])
    assert _read(text) == {"nnsight_hpc_a": [({"pool": label, "state": "b"}, value)]}


@given(st.lists(st.floats(0, 1e5)))
def test_a_histogram_counts_each_value_in_the_bucket_where_it_belongs(values):
    """The counts are those of the values between two bounds, and the sum is theirs."""
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    edges = [(low, high) for low, high in zip((float("-inf"), *BOUNDS), (*BOUNDS, float("inf")), strict=True)]
    assert histogram.counts == [sum(low < value <= high for value in values) for low, high in edges]
    assert histogram.sum == pytest.approx(sum(values))


def test_an_end_is_counted_once_though_it_is_told_twice():
    """The counters know which requests live, and a request that ran has a wait and a run."""
    counters = Counters()
    ended = _row(_Q.COMPLETED, QUEUED=10.0, RUNNING=10.2, COMPLETED=15.2)
    for told in (_row(_Q.QUEUED, QUEUED=10.0), ended, ended):
        counters.note(told)
    assert counters.ends == {(_OF, _Q.COMPLETED): 1}
    assert (counters.waits[_OF].sum, counters.runs[_OF].sum) == (pytest.approx(0.2), pytest.approx(5.0))


def test_one_that_was_cancelled_in_the_queue_has_waited_and_not_run():
    """Its wait ends with it."""
    counters = Counters()
    counters.note(_row(_Q.QUEUED, QUEUED=10.0))
    counters.note(_row(_Q.CANCELLED, QUEUED=10.0, CANCELLED=13.0))
    assert (counters.waits[_OF].sum, _OF in counters.runs) == (pytest.approx(3.0), False)


def test_a_run_that_was_lost_counts_for_nothing():
    """One that was queued again has waited since then, and has not run when it is cancelled before its next start."""
    counters = Counters()
    counters.note(_row(_Q.QUEUED, RUNNING=10.0, QUEUED=20.0))
    counters.note(_row(_Q.CANCELLED, RUNNING=10.0, QUEUED=20.0, CANCELLED=25.0))
    assert (counters.waits[_OF].sum, _OF in counters.runs) == (pytest.approx(5.0), False)


def test_prometheus_reads_the_daemon(daemon, worker):
    """Pools, replicas by state, the queue, requests by their end, and their seconds."""
    http = daemon.people()
    before = _value(daemon, "requests_ended_total", end="completed")
    send(http, first := new_request_id())
    send(http, new_request_id())
    lease = worker.lease()
    worker.started(lease)
    worker.report(ReplicaState.BUSY, running=(first,))
    assert (_value(daemon, "requests_running", pool="smol"), _value(daemon, "requests_queued", pool="smol")) == (1, 1)
    assert _value(daemon, "pool_replicas", pool="smol", state="busy") == 1
    assert 0 < _value(daemon, "requests_oldest_seconds", pool="smol") < 300
    worker.outcome(Outcome(id=lease.id, attempt=lease.attempt, error=None, result_bytes=0))
    wait_for(lambda: _value(daemon, "requests_ended_total", end="completed") == before + 1)
    assert _value(daemon, "request_run_seconds_count", pool="smol", kind="run") >= 1
    started = _value(daemon, "start_seconds")
    assert time.time() - 300 < started < time.time()


def test_the_answer_names_the_format(daemon):
    """The content type is that of the text format 0.0.4, which is how Prometheus knows it."""
    assert _metrics(daemon).headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
