"""Tables and quantities for people: rich on a terminal, aligned text elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable


class Table(msgspec.Struct, frozen=True):
    """Rows under headers; `empty` is what is said when there are none."""

    headers: list[str]
    rows: list[list[str]]
    empty: str = ""


_STYLES = {
    **dict.fromkeys(("ready", "busy", "completed"), "green"),
    **dict.fromkeys(("submitted", "pending", "starting", "loading", "draining", "queued"), "yellow"),
    **dict.fromkeys(("failed", "expired"), "red"),
    **dict.fromkeys(("ended", "cancelled"), "dim"),
}
"""How a cell under ``state`` looks, by its first word."""


def print_table(headers: list[str], rows: list[list[str]], *, empty: str = "") -> None:
    """Print rows under headers, or `empty` when there are none."""
    print_blocks([Table(headers, rows, empty)])


def print_blocks(blocks: Iterable[str | Table]) -> None:
    """Print lines and tables one below the other, with an empty line between them."""
    if sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415 - 50 ms that a pipe need not pay

        Console().print(rich_blocks(blocks))
    elif text := as_text(blocks):
        print(text)


def as_text(blocks: Iterable[str | Table]) -> str:
    """The blocks as lines of text."""
    return "\n\n".join(filter(None, map(_block_text, blocks)))


def rich_blocks(blocks: Iterable[str | Table]) -> Any:
    """The blocks as one renderable of rich."""
    from rich.console import Group  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415

    parts: list[Any] = []
    for block in blocks:
        shown = _or_empty(block)
        if shown:
            parts += [Text()] if parts else []
            parts.append(_rich_table(shown) if isinstance(shown, Table) else Text(shown))
    return Group(*parts)


def _block_text(block: str | Table) -> str:
    shown = _or_empty(block)
    return shown if isinstance(shown, str) else "\n".join(aligned(shown.headers, shown.rows))


def _or_empty(block: str | Table) -> str | Table:
    """The block, or what is said in place of a table without rows: perhaps nothing."""
    return block.empty if isinstance(block, Table) and not block.rows else block


def aligned(headers: list[str], rows: list[list[str]]) -> list[str]:
    """Lines with columns two spaces apart; a cell's newlines become spaces."""
    cells = [[cell.replace("\n", " ") for cell in row] for row in ([name.upper() for name in headers], *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _rich_table(block: Table) -> Any:
    from rich.table import Table as Rich  # noqa: PLC0415 - as above
    from rich.text import Text  # noqa: PLC0415

    table = Rich(*block.headers, box=None, pad_edge=False, header_style="bold")
    for row in block.rows:
        cells = zip(block.headers, row, strict=True)
        table.add_row(*(Text(cell, style=_style(cell) if header == "state" else "") for header, cell in cells))
    return table


def _style(state: str) -> str:
    return _STYLES.get(state.partition(" ")[0], "")


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


def age(seconds: float) -> str:
    """Roughly how long: in the largest unit of which there is more than one."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def since(when: float) -> str:
    """How long ago a moment (seconds since the epoch) was."""
    return f"{duration(time.time() - when)} ago" if when else ""


def moment(when: float) -> str:
    """A moment by this machine's clock: the time, and the date too where it is not today."""
    local, today = time.localtime(when), time.localtime()
    same_day = (local.tm_year, local.tm_yday) == (today.tm_year, today.tm_yday)
    return time.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M:%S", local)
