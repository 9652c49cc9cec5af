"""What Prometheus reads of a daemon, in its text format 0.0.4.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/. There is no label for users: what each of them does is
nobody's business, and time series would be without number.
"""

from __future__ import annotations

import time
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import psutil

from nnsight_hpc.daemon.counters import BOUNDS
from nnsight_hpc.wire.states import ReplicaState, RequestState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from nnsight_hpc.daemon.counters import Counters, Histogram, Requested
    from nnsight_hpc.daemon.parts import Parts
    from nnsight_hpc.daemon.requests import Requests
    from nnsight_hpc.wire.pools import PoolStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "nnsight_hpc_"


class Sample(NamedTuple):
    """One value; `suffix` is that of a histogram's series."""

    value: float
    labels: Mapping[str, str] = {}
    suffix: str = ""


class Family(NamedTuple):
    """All samples of one metric; `kind` is ``gauge``, ``counter`` or ``histogram``."""

    name: str
    kind: str
    help: str
    samples: Iterable[Sample]


def measure(parts: Parts) -> str:
    """All metrics of a daemon, as text."""
    requests = parts.requests
    pools = [parts.pools.status(name, requests.demand(name).queued) for name in parts.pools.names()]
    hello = parts.hello
    about = {"version": hello.version, "executor": hello.executor, "host": hello.host, "epoch": str(hello.epoch)}
    return as_text(
        [
            Family("info", "gauge", "The daemon that answers; always 1.", [Sample(1, about)]),
            *_of_process(),
            *_of_pools(pools),
            *_of_queue(requests, [pool.spec.name for pool in pools]),
            *_of_ended(requests.counters),
        ]
    )


def _of_process() -> Iterator[Family]:
    process = psutil.Process()
    with process.oneshot():
        cpu, memory, files = process.cpu_times(), process.memory_info().rss, process.num_fds()
        begun = process.create_time()
    yield _one("start_seconds", "When the daemon started, in seconds since the epoch.", begun)
    yield _one("cpu_seconds_total", "CPU time that the daemon has used.", cpu.user + cpu.system, kind="counter")
    yield _one("memory_bytes", "Resident memory of the daemon.", memory)
    yield _one("open_files", "Files and connections that the daemon has open.", files)


def _one(name: str, help: str, value: float, *, kind: str = "gauge") -> Family:
    return Family(name, kind, help, [Sample(value)])


def _of_pools(pools: list[PoolStatus]) -> Iterator[Family]:
    def each(name: str, help: str, values: Iterable[float], kind: str = "gauge") -> Family:
        of_pools = zip(pools, values, strict=True)
        return Family(name, kind, help, [Sample(value, {"pool": pool.spec.name}) for pool, value in of_pools])

    yield each("pool_replicas_wanted", "Replicas that there are to be, without successors.", (p.desired for p in pools))
    states = [state for state in ReplicaState if not state.ended]
    counted = [
        Sample(sum(one.state is state for one in pool.replicas), {"pool": pool.spec.name, "state": state.lower()})
        for pool in pools
        for state in states
    ]
    yield Family("pool_replicas", "gauge", "Replicas by state; those that have ended are not counted.", counted)
    yield each(
        "pool_held", "1: no replica is started any more, since several have failed.", (bool(p.held) for p in pools)
    )
    used = (p.gpu_seconds for p in pools)
    yield each("pool_gpu_seconds_total", "GPU time of the pool's replicas so far.", used, "counter")


def _of_queue(requests: Requests, pools: list[str]) -> Iterator[Family]:
    demands = [(requests.demand(pool), {"pool": pool}) for pool in pools]
    now = time.time()
    queued = [Sample(demand.queued, labels) for demand, labels in demands]
    running = [Sample(demand.running, labels) for demand, labels in demands]
    oldest = [Sample(max(0.0, now - (demand.oldest or now)), labels) for demand, labels in demands]
    yield Family("requests_queued", "gauge", "Requests that wait for a worker.", queued)
    yield Family("requests_running", "gauge", "Requests that a worker holds.", running)
    yield Family("requests_oldest_seconds", "gauge", "How long the one has waited that has waited longest.", oldest)


def _of_ended(counters: Counters) -> Iterator[Family]:
    ends = [Sample(count, _labels(of) | {"end": end.lower()}) for (of, end), count in sorted(counters.ends.items())]
    yield Family("requests_ended_total", "counter", f"Requests that have ended, by their end ({_ENDS}).", ends)
    waits, runs = _samples(counters.waits), _samples(counters.runs)
    yield Family("request_wait_seconds", "histogram", "From the queue to the start of those that have ended.", waits)
    yield Family("request_run_seconds", "histogram", "From the start to the end of those that have run.", runs)


_ENDS = ", ".join(state.lower() for state in RequestState if state.ended)


def _samples(histograms: Mapping[Requested, Histogram]) -> Iterator[Sample]:
    for of, histogram in sorted(histograms.items()):
        labels, counts = _labels(of), list(accumulate(histogram.counts))
        for bound, count in zip((*BOUNDS, float("inf")), counts, strict=True):
            yield Sample(count, labels | {"le": _number(bound)}, "_bucket")
        yield Sample(histogram.sum, labels, "_sum")
        yield Sample(counts[-1], labels, "_count")


def _labels(of: Requested) -> dict[str, str]:
    return {"pool": of.pool, "kind": of.kind}


def as_text(families: Iterable[Family]) -> str:
    """The families in the text format; one without samples has a head only."""
    return "".join(line + "\n" for family in families for line in _lines(family))


def _lines(family: Family) -> Iterator[str]:
    name = _PREFIX + family.name
    yield f"# HELP {name} {_escaped(family.help)}"
    yield f"# TYPE {name} {family.kind}"
    for sample in family.samples:
        labels = ",".join(f'{key}="{_quoted(value)}"' for key, value in sample.labels.items())
        yield f"{name}{sample.suffix}{f'{{{labels}}}' if labels else ''} {_number(sample.value)}"


def _number(value: float) -> str:
    return "+Inf" if value == float("inf") else f"{value:d}" if isinstance(value, int) else repr(value)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', r"\"")
