"""How far something is, on stderr: a bar on a terminal, a line every few seconds elsewhere (a log, a pipe)."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

LINE_EVERY = 5.0


class Progress:
    """Shows a label, and what `show` was last told."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Any = None
        self._line = ""
        self._printed = time.monotonic() - LINE_EVERY + 1  # nothing is said of what takes less than a second
        if sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task(label, total=None, detail="")

    def show(self, detail: str, *, done: float | None = None, total: float | None = None) -> None:
        """Say where things stand: in words, and as a part of a total where there is one."""
        if self._bar is not None:
            self._bar.update(self._task, detail=detail, completed=done or 0, total=total or None)
            return
        share = f" {done / total:.0%}" if total and done is not None else ""
        line = f"{self._label}:{share} {detail}"
        if line != self._line and time.monotonic() - self._printed >= LINE_EVERY:
            print(line, file=sys.stderr, flush=True)
            self._line, self._printed = line, time.monotonic()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar() -> Any:
    from rich.console import Console  # noqa: PLC0415 - 60 ms that only a terminal pays
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    return Bar(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
