"""An executor that runs in a process of its own: on a host of the test cluster, as one of its users.

Run as a program it serves the calls that `RemoteExecutor` writes to it, one JSON line each.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nnsight_hpc.slurm.batch.executor import JobInfo, JobState, Survey
from nnsight_hpc.wire.errors import ErrorReport, HpcError, from_report
from nnsight_hpc.wire.messages import decode, encode
from nnsight_hpc.wire.places import Places, places_at
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import EndCause

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tests.cluster import Cluster


class RemoteExecutor:
    """`SlurmExecutor("tiny_worker")` of a user on a host; each method is one call in that process."""

    name = "slurm"

    def __init__(self, cluster: Cluster, *, user: str, env: Mapping[str, str]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        self._process = cluster.popen("login", [sys.executable, __file__], user=user, env=env, **pipes)

    def submit(self, replica: str, spec: PoolSpec, places: Places, *, begin: float | None = None) -> str:
        return str(self._call("submit", replica, spec, places, begin=begin))

    def script(self, replica: str, spec: PoolSpec, places: Places, *, begin: float | None = None) -> str:
        return str(self._call("script", replica, spec, places, begin=begin))

    def survey(self, jobs: Sequence[str], places: Places) -> Survey:
        found = self._call("survey", list(jobs), places)
        return Survey({job: _info(**info) for job, info in found["jobs"].items()}, found["ours"], found["doubt"])

    def position(self, job: str) -> int | None:
        return msgspec.convert(self._call("position", job), int | None)

    def check(self, spec: PoolSpec) -> None:
        self._call("check", spec)

    def estimate(self, replica: str, spec: PoolSpec, places: Places) -> tuple[float | None, str]:
        return msgspec.convert(self._call("estimate", replica, spec, places), tuple[float | None, str])

    def drain(self, job: str) -> None:
        self._call("drain", job)

    def cancel(self, job: str) -> None:
        self._call("cancel", job)

    def close(self) -> None:
        self._process.communicate(timeout=120)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        plain = [_PACKED[type(a)](a) if type(a) in _PACKED else a for a in arguments]
        print(json.dumps([method, plain, options]), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise from_report(msgspec.convert(answer["error"], ErrorReport))
        return answer["result"]


_PACKED = {PoolSpec: lambda spec: {"spec": encode(spec).decode()}, Places: lambda places: {"home": str(places.home)}}


def _info(state: str, cause: str | None, **rest: Any) -> JobInfo:
    return JobInfo(JobState(state), cause=cause and EndCause(cause), **rest)


def _unpacked(argument: Any) -> Any:
    match argument:
        case {"spec": text}:
            return decode(text.encode(), PoolSpec)
        case {"home": home}:
            return places_at(Path(home))
    return argument


def serve() -> None:
    from nnsight_hpc.slurm.batch.slurm import SlurmExecutor

    executor = SlurmExecutor("tiny_worker")
    for line in sys.stdin:
        method, arguments, options = json.loads(line)
        try:
            answer = {"result": getattr(executor, method)(*map(_unpacked, arguments), **options)}
        except HpcError as error:
            answer = {"error": error.report()}
        print(msgspec.json.encode(answer).decode(), flush=True)


if __name__ == "__main__":
    serve()
