"""How far something is: a bar on a terminal, a line that changes in a notebook, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from types import TracebackType

LINE_EVERY = 5.0


class Progress:
    """Shows a label, and what `show` was last told; nothing in the first `after` seconds."""

    def __init__(self, label: str, *, after: float = 0.0) -> None:
        self._label, self._begin = label, time.monotonic() + after
        self._display: _Display | None = None

    def show(self, detail: str, *, done: float | None = None, total: float | None = None) -> None:
        """Say where things stand: in words, and as a part of a total where there is one."""
        if time.monotonic() < self._begin:
            return
        if self._display is None:
            self._display = _display(self._label)
        self._display.show(detail, done, total)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.close()


def is_watched() -> bool:
    """Whether a person looks on, so that what is shown may change often."""
    return sys.stderr.isatty() or _in_notebook()


class _Display(Protocol):
    def show(self, detail: str, done: float | None, total: float | None) -> None: ...
    def close(self) -> None: ...


def _display(label: str) -> _Display:
    if _in_notebook():
        return _Cell(label)
    return _Bar(label) if sys.stderr.isatty() else _Lines(label)


def _in_notebook() -> bool:
    """Whether this is a cell of Jupyter and its like: IPython with a kernel, and then it has been imported."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class _Bar:
    """On a terminal: a live line on stderr, gone in the end."""

    def __init__(self, label: str) -> None:
        from rich.console import Console  # noqa: PLC0415 - 60 ms that only a terminal pays
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415

        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what a script prints into a file stays there
        )
        self._task = self._bar.add_task(label, total=None, detail="")
        self._bar.start()

    def show(self, detail: str, done: float | None, total: float | None) -> None:
        self._bar.update(self._task, detail=detail, completed=done or 0, total=total or None)

    def close(self) -> None:
        self._bar.stop()


class _Cell:
    """In a notebook: a line of the cell's output that changes in place, empty in the end."""

    def __init__(self, label: str) -> None:
        from IPython.display import display  # noqa: PLC0415 - it is there: it runs us

        self._label = label
        self._handle: Any = display(_plain(""), raw=True, display_id=True)  # type: ignore[no-untyped-call]

    def show(self, detail: str, done: float | None, total: float | None) -> None:
        self._handle.update(_plain(_line(self._label, detail, done, total)), raw=True)

    def close(self) -> None:
        self._handle.update(_plain(""), raw=True)


class _Lines:
    """Elsewhere: lines on stderr, when they say something new, and none for what takes less than a second."""

    def __init__(self, label: str) -> None:
        self._label, self._last = label, ""
        self._printed = time.monotonic() - LINE_EVERY + 1

    def show(self, detail: str, done: float | None, total: float | None) -> None:
        line = _line(self._label, detail, done, total)
        if line != self._last and time.monotonic() - self._printed >= LINE_EVERY:
            print(line, file=sys.stderr, flush=True)
            self._last, self._printed = line, time.monotonic()

    def close(self) -> None: ...


def _line(label: str, detail: str, done: float | None, total: float | None) -> str:
    share = f" {done / total:.0%}" if total and done is not None else ""
    return f"{label}:{share} {detail}"


def _plain(text: str) -> dict[str, str]:
    return {"text/plain": text}
