"""Tables and quantities for people: rich on a terminal, aligned text elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str = "") -> None:
    """Print rows under headers, or `empty` when there are none."""
    rows = [list(row) for row in rows]
    if not rows:
        print(empty) if empty else None
    elif sys.stdout.isatty():
        _print_rich(headers, rows)
    else:
        print("\n".join(aligned(headers, rows)))


def aligned(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns two spaces apart; a cell's newlines become spaces."""
    cells = [[cell.replace("\n", " ") for cell in row] for row in ([name.upper() for name in headers], *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _print_rich(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console  # noqa: PLC0415 - 50 ms that a pipe need not pay
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(*headers, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def size(number: float) -> str:
    """Bytes with a unit: powers of 1024, as Slurm and ``ls -h`` count."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("not reached")


def duration(seconds: float) -> str:
    """``h:mm:ss``, or ``m:ss``."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def since(moment: float) -> str:
    """How long ago a moment (seconds since the epoch) was."""
    return f"{duration(time.time() - moment)} ago" if moment else ""
