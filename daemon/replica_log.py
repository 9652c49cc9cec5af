"""Parts of a replica's log as people read it, in whole lines, from its end or from a byte on; of all ranks or of one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nnsight_hpc.slurm.batch.log_lines import of_rank
from nnsight_hpc.wire.logs import readable

if TYPE_CHECKING:
    from pathlib import Path

PART = 256 << 10
"""Bytes that are read for one answer when a log is followed, and so of one line at most."""
_END = 4 << 20
"""Bytes of a log's end among which its last lines are looked for."""


def last_part(path: Path, lines: int, rank: int | None, *, ended: bool) -> tuple[str, int]:
    """The last `lines` lines, and the byte after them; nothing where there is no log."""
    size = path.stat().st_size if path.exists() else 0
    start = max(0, size - _END)
    data = _whole(_read(path, start, size - start), ended=ended)
    shown = data[data.find(b"\n") + 1 :] if start else data
    return "".join(_of(shown, rank).splitlines(keepends=True)[-lines:]), start + len(data)


def next_part(path: Path, start: int, rank: int | None, *, ended: bool) -> tuple[str, int]:
    """The lines from byte `start` on, and the byte after them."""
    data = _read(path, start, PART)
    whole = _whole(data, ended=ended or (len(data) == PART and b"\n" not in data))
    return _of(whole, rank), start + len(whole)


def _whole(data: bytes, *, ended: bool) -> bytes:
    """Without a last line that is still being written; of a log that has `ended`, all."""
    return data if ended else data[: data.rfind(b"\n") + 1]


def _read(path: Path, start: int, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(min(start, end))  # file systems refuse places that no file of theirs could have
            return file.read(most)
    except FileNotFoundError:
        return b""


def _of(data: bytes, rank: int | None) -> str:
    text = data.decode("utf-8", "replace")
    return readable(text if rank is None else of_rank(text, rank))
