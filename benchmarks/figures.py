"""The one form of all benchmarks: figures with a goal, as a table and as JSON.

A benchmark is a script that hands `main` a function from ``quick`` to figures::

    python benchmarks/NAME.py [--quick] [--json FILE]

``--quick`` ends in 60 s. The exit code is 1 when a figure misses its goal.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_COMPARE = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Figure:
    """One number, what it is measured against in the same run, and what it should reach (None: only told)."""

    name: str
    value: float
    goal: float | None
    comparison: Literal["<=", ">="]
    against: str

    @property
    def ok(self) -> bool:
        return self.goal is None or _COMPARE[self.comparison](self.value, self.goal)

    def as_dict(self) -> dict[str, object]:
        parts = ("name", "value", "goal", "comparison", "against", "ok")
        return {part: getattr(self, part) for part in parts}


def main(measure: Callable[[bool], Iterable[Figure]], description: str) -> None:
    """Parse the arguments, measure, print the table, write the JSON, and exit."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="end in 60 s, with rougher figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    figures = list(measure(options.quick))
    table = Table("figure", "value", "goal", "against", "", title=description.splitlines()[0])
    for figure in figures:
        goal = "" if figure.goal is None else f"{figure.comparison} {figure.goal:g}"
        table.add_row(escape(figure.name), f"{figure.value:.3g}", goal, figure.against, "" if figure.ok else "missed")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([figure.as_dict() for figure in figures], indent=1))
    sys.exit(0 if all(figure.ok for figure in figures) else 1)
