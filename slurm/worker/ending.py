"""How a worker says why it ended: a file beside its log, and a message where a daemon listens."""

from __future__ import annotations

import logging
import os
import re
import secrets
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from nnsight_hpc.slurm.worker.link import Link
from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.files import read_if_there, write_atomically
from nnsight_hpc.wire.messages import decode, encode
from nnsight_hpc.wire.states import EndCause
from nnsight_hpc.wire.workers import EndRecord

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.slurm.worker.control import Control
    from nnsight_hpc.slurm.worker.link import DaemonAddress
    from nnsight_hpc.wire.places import Places

_POST = 3.0
"""Seconds for which the daemon is told; after that the file has to do."""
_LAST_WORDS, _EXIT_CODE = 10.0, 70
"""Seconds in which a process that hangs has to tell of it, and its exit code: EX_SOFTWARE of sysexits.h."""
_MEMORY = re.compile(r"out of memory|MemoryError|DefaultCPUAllocator|Cannot allocate memory|not the memory")
"""How Python, torch, CUDA, the C library and we say it. Errors come from other ranks as text, so it is the text that counts."""
logger = logging.getLogger(__name__)


def end(control: Control, places: Places, address: DaemonAddress, *, alone: bool) -> int:
    """Record the end of the worker, and return its exit code: 1 when it failed.

    One of several ranks that is told to end by a signal does not know why: another rank may have been killed. What
    started them knows, and says it (`epilogue`).
    """
    if failure := control.failure:
        tell(record_of(control.replica, failure), places, address)
        print(failure, file=sys.stderr, flush=True)  # the log's last lines are what the daemon shows of it
        return 1
    if alone or not control.terminating.is_set():
        cause = EndCause.CANCELLED if control.terminating.is_set() else EndCause.DRAINED
        tell(EndRecord(replica=control.replica, cause=cause, time=time.time()), places, address)
    return 0


def end_hanging(replica: str, places: Places, address: DaemonAddress, failure: HpcError) -> None:
    """End a process whose model's thread cannot: tell why, and exit, even where the record's file system does not answer."""
    logger.error("this worker ends: %s", failure)
    deadline = threading.Timer(_LAST_WORDS, os._exit, (_EXIT_CODE,))
    deadline.daemon = True
    deadline.start()
    record = record_of(replica, failure, EndCause.LOST)
    _post(record, address)
    write(record, places)
    os._exit(_EXIT_CODE)


def record_of(replica: str, failure: HpcError, cause: EndCause | None = None) -> EndRecord:
    """The record of a worker that ends because of `failure`."""
    cause = cause or (EndCause.OUT_OF_MEMORY if _MEMORY.search(str(failure)) else EndCause.CRASHED)
    return EndRecord(replica=replica, cause=cause, detail=str(failure), time=time.time())


def tell(record: EndRecord, places: Places, address: DaemonAddress) -> None:
    """Write the record down, unless there is one, and tell the daemon what is written."""
    write(record, places)
    if places.lease.exists():
        _post(written(record.replica, places) or record, address)


def write(record: EndRecord, places: Places) -> None:
    """Write the record of a worker's end beside its log, unless there is one: the first reason is the cause of others."""
    path = _path(record.replica, places)
    mine = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(mine, encode(record))
        _name_first(mine, path)
    except OSError as error:
        logger.warning("the record of the worker's end could not be written: %s", error)


def correct(record: EndRecord, places: Places) -> None:
    """Write the record of a worker's end in place of one that knew less."""
    write_atomically(_path(record.replica, places), encode(record))


def written(replica: str, places: Places) -> EndRecord | None:
    """The record of a worker's end, if there is one."""
    data = read_if_there(_path(replica, places))
    return decode(data, EndRecord, what="record of the end") if data else None


def _name_first(mine: Path, path: Path) -> None:
    """Give a file its name unless another one has it."""
    try:
        path.hardlink_to(mine)
    except FileExistsError:
        mine.unlink()
    except OSError:  # a file system without hard links: now the last one has it
        mine.replace(path)
    else:
        mine.unlink()


def _path(replica: str, places: Places) -> Path:
    return places.replica(replica) / "end.json"


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
