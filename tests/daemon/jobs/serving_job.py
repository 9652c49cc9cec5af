"""A job whose worker serves: it loads for a while, answers each request at once, and drains as a worker does.

Beside its walltime it keeps to one more rule of ours: it takes nothing new in the last eighth of it.
"""

import argparse
import json
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.states import EndCause, ReplicaState
from nnsight_hpc.wire.workers import EndRecord
from tests.daemon.jobs.timed_job import keep_time
from tests.daemon.process import DaemonProcess, Worker

LOAD = 0.3


def until_it_works(call):
    """What `call` gives, however long no daemon is there."""
    while True:
        with suppress(HpcError, OSError):
            return call()
        time.sleep(0.05)


class Serving:
    def __init__(self, home: Path, replica: str) -> None:
        self._daemon = DaemonProcess(home.parents[1])
        self._replica = replica
        self._ends = json.loads((home / "replicas" / replica / "batch.json").read_bytes())
        self.worker = until_it_works(self._connect)

    def _connect(self) -> Worker:
        worker = Worker(self._daemon, self._replica)
        worker.register()
        return worker

    def serve(self) -> None:
        """Report, and answer what is leased, until it is to drain."""
        while not self._leaves():
            try:
                if self.worker.report(ReplicaState.READY).drain:
                    return
                while not self._leaves() and (lease := self.worker.lease(wait=0.3)):
                    self.worker.started(lease)
                    self.worker.finish(lease, b"answer")
            except (HpcError, OSError):
                self.worker = until_it_works(self._connect)

    def end(self) -> None:
        record = EndRecord(replica=self._replica, cause=EndCause.DRAINED, time=time.time())
        with suppress(HpcError, OSError):
            self.worker.post("/w1/end", record)

    def _leaves(self) -> bool:
        return time.time() > self._ends["ends"] - (self._ends["ends"] - self._ends["starts"]) / 8


if __name__ == "__main__":
    home = keep_time()
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path)
    parser.add_argument("--replica")
    time.sleep(LOAD)
    serving = Serving(home, parser.parse_args().replica)
    serving.serve()
    serving.end()
