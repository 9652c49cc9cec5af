"""How many bytes a request may return by its pool's policy: what it saves, and what it says while it runs.

It is looked at before anything is packed, written or sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import torch

from nnsight_hpc.graph.nodes import leaves
from nnsight_hpc.wire.errors import Denied

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.wire.errors import ErrorReport

_SHOWN = 5
"""Saved values whose sizes an error shows."""
_WORDS = 1000
"""Characters of each part of an error that are shown however little may be returned."""


class Allowance:
    """What a request may return.

    Parameters
    ----------
    limit
        In bytes; None: any number.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit, self._said = limit, 0

    def counting(self, say: Callable[[str, str], None]) -> Callable[[str, str], None]:
        """`say`, which raises `Denied` for the line that is too much."""

        def count(text: str, source: str) -> None:
            self._said += len(text.encode("utf-8", "replace"))
            self.check(0, source)
            say(text, source)

        return say if self._limit is None else count

    def check_values(self, values: Mapping[str, Any], graph: Graph) -> None:
        """Raise `Denied` where the tensors among what `graph` has saved are too large, at the line of the largest."""
        if self._limit is None:
            return
        sizes = {name: _bytes(value) for name, value in values.items()}
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:_SHOWN]
        where = graph.nodes[graph.saves[largest[0]]].source if largest else None
        self.check(sum(sizes.values()), str(where or ""), *(f"{name}: {sizes[name]} bytes" for name in largest))

    def check(self, size: int, where: str, *details: str) -> None:
        """Raise `Denied` unless `size` bytes may be returned beside what was said."""
        if self._limit is None or size + self._said <= self._limit:
            return
        said = f" beside {self._said} bytes of what it said" if self._said else ""
        raise Denied(
            f"the request returns more than its pool's policy allows: {self._limit} bytes",
            where=where,
            why="\n".join([f"it would return {size} bytes{said}", *details]),
            next="save less: a mean, some positions, another dtype; or divide it among several requests",
        )

    def cut(self, report: ErrorReport) -> ErrorReport:
        """A report whose words, which may be values of the graph, are no longer than what may be returned."""
        if self._limit is None:
            return report
        most = max(self._limit, _WORDS)
        return msgspec.structs.replace(report, what=report.what[:most], why=report.why[:most])


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in leaves(value) if isinstance(leaf, torch.Tensor))
