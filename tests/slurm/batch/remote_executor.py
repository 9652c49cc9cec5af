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

from nnsight_hpc.slurm.batch.executor import JobInfo, JobState
from nnsight_hpc.wire.errors import ErrorReport, HpcError, from_report
from nnsight_hpc.wire.messages import PoolSpec, decode, encode
from nnsight_hpc.wire.places import places_at

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nnsight_hpc.wire.places import Places
    from tests.cluster import Cluster


class RemoteExecutor:
    """`SlurmExecutor("tiny_worker")` of a user on a host; each method is one call in that process."""

    name = "slurm"

    def __init__(self, cluster: Cluster, *, user: str, env: Mapping[str, str]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        self._process = cluster.popen("login", [sys.executable, __file__], user=user, env=env, **pipes)

    def submit(self, replica: str, spec: PoolSpec, places: Places) -> str:
        return str(self._call("submit", replica, spec, str(places.home)))

    def script(self, replica: str, spec: PoolSpec, places: Places) -> str:
        return str(self._call("script", replica, spec, str(places.home)))

    def query(self, jobs: Sequence[str]) -> dict[str, JobInfo]:
        infos = self._call("query", list(jobs))
        return {job: JobInfo(**{**info, "state": JobState(info["state"])}) for job, info in infos.items()}

    def drain(self, job: str) -> None:
        self._call("drain", job)

    def cancel(self, job: str) -> None:
        self._call("cancel", job)

    def close(self) -> None:
        self._process.communicate(timeout=30)

    def _call(self, method: str, *arguments: Any) -> Any:
        plain = [json.loads(encode(a)) if isinstance(a, PoolSpec) else a for a in arguments]
        print(json.dumps([method, *plain]), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise from_report(msgspec.convert(answer["error"], ErrorReport))
        return answer["result"]


def serve() -> None:
    from nnsight_hpc.slurm.batch.slurm import SlurmExecutor

    executor = SlurmExecutor("tiny_worker")
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        if method in ("submit", "script"):
            places = places_at(Path(arguments[2]))
            arguments = [arguments[0], decode(json.dumps(arguments[1]).encode(), PoolSpec), places]
        try:
            answer = {"result": getattr(executor, method)(*arguments)}
        except HpcError as error:
            answer = {"error": error.report()}
        print(msgspec.json.encode(answer).decode(), flush=True)


if __name__ == "__main__":
    serve()
