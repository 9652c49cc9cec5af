"""What requests have said while they ran: a file beside the request's bytes for each attempt, JSON lines of `LogLine`.

A worker sends the bytes together with their place in the file. So it does no harm when they come twice, and nothing but
the file has to outlive the daemon. For people the files of all attempts are one log.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import Conflict, InvalidInput
from nnsight_hpc.wire.messages import LogLine, decode

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MOST = 2 << 20
"""Bytes of one attempt's log at most; workers keep below it."""
PART = 256 << 10
"""Bytes that are read for one answer, and so of one line at most."""


def write(path: Path, at: int, lines: bytes) -> None:
    """Put `lines`, whole lines of JSON, at byte `at` of the log `path`.

    Raises
    ------
    InvalidInput
        They are not whole lines, or would make the log too long.
    Conflict
        They do not follow what is there, or cannot be written.
    """
    if at + len(lines) > MOST or not lines.endswith(b"\n"):
        raise InvalidInput(f"not a part of a log of at most {MOST} bytes", where=str(path))
    for line in lines.splitlines(keepends=True):
        decode(line[:PART], LogLine, what="line of a log")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if (size := os.fstat(descriptor).st_size) < at:
                raise Conflict("a part of the log is missing", where=str(path), why=f"{size} bytes of {at} are there")
            os.pwrite(descriptor, lines, at)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Conflict("the log cannot be written", where=str(path), why=str(error)) from error


def read(paths: Iterable[Path], start: int) -> tuple[tuple[LogLine, ...], int, bool]:
    """The lines from byte `start` on of the logs `paths` taken together, where to read on, and whether that is the end."""
    data, skipped, left = b"", 0, False
    for path in paths:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, min(size, start - skipped)))
                data += file.read(PART - len(data))
                left = file.tell() < size
        except FileNotFoundError:
            continue
        skipped += size
        if left:
            break
    whole = data[: data.rfind(b"\n") + 1]
    return tuple(_lines(whole)), start + len(whole), not left


def _lines(data: bytes) -> Iterable[LogLine]:
    for line in data.splitlines():
        try:
            yield decode(line, LogLine)
        except InvalidInput:  # a full disk, or the end of a machine, has cut it short
            continue
