"""How a worker says why it ended: a file beside its log, and a message where a daemon listens."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from nnsight_hpc.slurm.worker.link import Link
from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.messages import EndRecord, encode

if TYPE_CHECKING:
    from nnsight_hpc.slurm.worker.control import Control
    from nnsight_hpc.slurm.worker.link import DaemonAddress
    from nnsight_hpc.wire.places import Places

DRAINED, CANCELLED, FAILED = "drained", "cancelled", "failed"
_POST = 3.0
"""Seconds for which the daemon is told; after that the file has to do."""
logger = logging.getLogger(__name__)


def end(control: Control, places: Places, address: DaemonAddress) -> int:
    """Record the end of the worker, and return its exit code: 1 when it failed."""
    failure = control.failure
    cause = FAILED if failure else CANCELLED if control.terminating.is_set() else DRAINED
    record = EndRecord(replica=control.replica, cause=cause, detail=str(failure or ""), time=time.time())
    _write(record, places)
    _post(record, address)
    if failure:
        print(failure, file=sys.stderr, flush=True)  # the log's last lines are what the daemon shows of it
    return 1 if failure else 0


def _write(record: EndRecord, places: Places) -> None:
    try:
        places.replica(record.replica).mkdir(parents=True, exist_ok=True)
        write_atomically(places.replica(record.replica) / "end.json", encode(record))
    except OSError as error:
        logger.warning("the record of the worker's end could not be written: %s", error)


def _post(record: EndRecord, address: DaemonAddress) -> None:
    hurry = threading.Event()
    hurry.set()
    link = Link(address)
    try:
        link.call("/w1/end", record, dict[str, Any], timeout=_POST, hurry=hurry, grace=_POST)
    except HpcError as error:
        logger.info("the daemon was not told of the end: %s", error)
    finally:
        link.close()
