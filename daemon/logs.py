"""The ends of log files as people read them, read from behind, so that a large log costs no more than a small one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nnsight_hpc.wire.logs import readable

if TYPE_CHECKING:
    from pathlib import Path

MOST_LINES = 10_000
_BLOCK = 64 << 10
_MOST = 4 << 20


def last_lines(path: Path, lines: int) -> str:
    """The last `lines` lines of a file, at most 4 MiB; nothing when it is not there."""
    try:
        with path.open("rb") as file:
            end = start = file.seek(0, os.SEEK_END)
            data = b""
            while start > max(0, end - _MOST) and data.count(b"\n") <= lines:
                start = max(0, start - _BLOCK)
                file.seek(start)
                data = file.read(min(_BLOCK, end - start - len(data))) + data
    except FileNotFoundError:
        return ""
    wanted = data.decode("utf-8", "replace").splitlines()[-lines:] if lines else []
    return readable("\n".join(wanted))
