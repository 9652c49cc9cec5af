"""A replica for tests: MPI ranks that hold models, are asked over a socket, and end with the tests whatever happens.

Starting ranks takes seconds, since each imports torch, and so does a model; a request takes milliseconds. So one replica of
each degree serves all tests of a session. Its ranks are the worker's own (`Team`, `Ranks`, `Runner`); what is missing is
the daemon, in whose place stands this file. Rank 0 ends when its socket does, which a killed test process closes, too.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

from nnsight_hpc.wire.errors import ErrorReport
from nnsight_hpc.wire.frames import joined, pack, parted, unpack
from nnsight_hpc.wire.messages import Message
from tests.devices import DEVICE
from tests.parallel.ranks import mpirun

if TYPE_CHECKING:
    from collections.abc import Sequence

_START = 200.0
"""Seconds for all ranks to import torch and meet, with other tests beside them."""
_ANSWER = 200.0
_END = 60.0
_LIFE = 3600.0
"""Seconds after which a forgotten replica ends by itself."""
_LENGTH = struct.Struct("<Q")


class Question(Message):
    """What rank 0 is asked: to run the graphs in the frames that come along on a model, which is loaded when it is new."""

    model: str
    view: str = "ShardedView"
    """Which of `tests.parallel.views` shows whole tensors."""
    counted: bool = False
    """Whether the modules whose forward runs are to be named."""
    estimated: bool = True
    """Whether rank 0 estimates the graph's memory first, as a worker does; for tests with little time it does not."""
    cancelled: int | None = None
    """The request that is cancelled, by its number, once the module `after` has run."""
    after: str = ""


class Answer(Message):
    """What a request came to; its result comes along. Of requests that come together `ran` is what ran for all."""

    error: ErrorReport | None = None
    cancelled: bool = False
    said: tuple[str, ...] = ()
    ran: tuple[str, ...] = ()


class Gone(Exception):
    """The ranks have ended; with what they wrote last. No `AssertionError`, which a test may expect of a comparison."""


class Replica:
    """So many ranks, started at once.

    Parameters
    ----------
    ranks
        How many.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._scratch = Path(tempfile.mkdtemp(prefix="nnh-mpi-"))
        self._lock = threading.Lock()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self._scratch / "socket"))
            listener.listen()
            listener.settimeout(1.0)
            program = ["-m", "tests.parallel.replica_rank", str(ranks), str(self._scratch)]
            self._process = mpirun(ranks, program, scratch=self._scratch, timeout=_LIFE, **_environment(ranks))
            self._connection = self._accepted(listener)
        self._connection.settimeout(_ANSWER)

    def _accepted(self, listener: socket.socket) -> socket.socket:
        for _ in range(int(_START)):
            if self._process.poll() is not None:
                break
            try:
                return listener.accept()[0]
            except TimeoutError:
                continue
        raise Gone(f"{self.ranks} ranks did not start:\n{self._end()}")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, question: Question, frame: bytes) -> tuple[Answer, bytes]:
        """What the ranks answer, and their result; see `ask_together`."""
        [answer] = self.ask_together(question, [frame])
        return answer

    def ask_together(self, question: Question, frames: Sequence[bytes]) -> list[tuple[Answer, bytes]]:
        """What the ranks answer to requests that may share a forward, and their results.

        Raises
        ------
        Gone
            The ranks have ended, or did not answer; now they have ended.
        """
        with self._lock:
            try:
                send(self._connection, pack(msgspec.json.encode(question), joined(frames)))
                received = receive(self._connection)
            except OSError:
                received = None
            if received is None:
                raise Gone(f"{self.ranks} ranks did not answer:\n{self._end()}")
        header, results = unpack(received)
        return [*zip(msgspec.json.decode(header, type=list[Answer]), map(bytes, parted(results)), strict=True)]

    def close(self) -> None:
        """Let the ranks go, and see that they do."""
        self._connection.close()
        self._end()

    def _end(self) -> str:
        """See that no rank is left; returns what they wrote last."""
        ours = psutil.Process(self._process.pid).children(recursive=True) if self.alive else []
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            for process in (*ours, psutil.Process(self._process.pid)):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
        output = self._scratch / "output"
        written = output.read_text(errors="replace")[-6000:] if output.exists() else ""
        shutil.rmtree(self._scratch, ignore_errors=True)
        return written


class Replicas:
    """The replicas of a test session, each started when it is first asked for, and again when it has ended."""

    def __init__(self) -> None:
        self._made: dict[int, Replica] = {}

    def of(self, ranks: int) -> Replica:
        found = self._made.get(ranks)
        if found is not None and found.alive:
            return found
        if found is not None:
            found.close()
        self._made[ranks] = Replica(ranks)
        return self._made[ranks]

    def close(self) -> None:
        for replica in self._made.values():
            replica.close()


def _environment(ranks: int) -> dict[str, str]:
    # Ranks that wait would keep those from working that they wait for: there are more of them than cores.
    yielding = {"OMPI_MCA_mpi_yield_when_idle": "1"}
    if DEVICE == "cpu":
        return yielding
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(ranks))))
    return {**yielding, "CUDA_VISIBLE_DEVICES": gpus}


def send(connection: socket.socket, frame: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(frame)) + frame)


def receive(connection: socket.socket) -> bytes | None:
    """The next frame; None when the other side has closed the connection."""
    length = _exactly(connection, _LENGTH.size)
    return None if length is None else _exactly(connection, _LENGTH.unpack(length)[0])


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(1 << 20, size - len(parts)))
        if not part:
            return None
        parts += part
    return bytes(parts)
