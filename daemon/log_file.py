"""The daemon's log, turned over while the daemon runs: the file that its standard error is."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from nnsight_hpc.daemon.logs import last_lines

if TYPE_CHECKING:
    from pathlib import Path

MOST = 8 << 20
"""Bytes of one file; a line more than that begins the next."""
KEPT = 4
"""So many earlier files stay: ``daemon.log.1`` is the newest of them."""

_STANDARD_OUTPUT, _STANDARD_ERROR = 1, 2


class TurnedOver(logging.StreamHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """Logs to standard error; where that is the file `path`, a new one takes its place whenever it is large.

    Standard output and error themselves are moved to the new file, for what is printed past us (the interpreter's last
    words). A daemon that runs in the foreground, whose standard error is no such file, turns nothing over.
    """

    def __init__(self, path: Path, *, most: int = MOST) -> None:
        super().__init__()
        self._path, self._most = path, most

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._is_full():
                _turn_over(self._path)
        except OSError:  # no space, or somebody has removed the folder: what there is to say goes where it went
            pass
        super().emit(record)

    def _is_full(self) -> bool:
        ours = os.fstat(_STANDARD_ERROR)
        return ours.st_size >= self._most and os.path.samestat(ours, self._path.stat())


def _turn_over(path: Path) -> None:
    old = path.stat()
    for number in range(KEPT - 1, 0, -1):
        if (older := earlier(path, number)).exists():
            older.replace(earlier(path, number + 1))
    path.replace(earlier(path, 1))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for stream in (_STANDARD_OUTPUT, _STANDARD_ERROR):
        if os.path.samestat(os.fstat(stream), old):
            os.dup2(descriptor, stream)
    os.close(descriptor)


def earlier(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def last_entries(path: Path, lines: int) -> str:
    """The last `lines` lines of the log as people read them, of its newest file and of as many before it as are needed."""
    text = last_lines(path, lines)
    for number in range(1, KEPT + 1):
        missing = lines - len(text.splitlines())
        if missing <= 0:
            break
        text = "\n".join(filter(None, [last_lines(earlier(path, number), missing), text]))
    return text
