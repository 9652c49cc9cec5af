"""A guard that all processes of a model obey: what it refuses in the first of them, no other one carries out.

The first process has checked a graph's memory, and knows what only the run can tell: sizes that depend on data, and on a GPU
indices out of bounds, which end a process. The others have neither the estimate nor the twin of the model, so at such nodes
they wait for its word.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nnsight_hpc.wire.errors import HpcError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nnsight_hpc.execution.estimate_guard import Guard
    from nnsight_hpc.execution.estimate_watch import Watch
    from nnsight_hpc.graph.nodes import Node


@dataclass(frozen=True)
class SharedGuard:
    """As `Guard`, in each of the processes.

    Attributes
    ----------
    unchecked
        The nodes that are looked at in the run, the same in all processes.
    agree
        Gives all processes the first one's number, or raises where that has failed.
    own
        The guard itself, in the first process.
    """

    unchecked: frozenset[int]
    agree: Callable[[int], int]
    own: Guard | None = None

    @property
    def watch(self) -> Watch | None:
        return None if self.own is None else self.own.watch

    def check(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise what the guard raises, elsewhere what `agree` raises then; `HpcError` where processes are at other nodes."""
        if self.own is not None:
            self.own.check(node, args, kwargs)
        if self.agree(node.id) != node.id:
            raise HpcError("the processes of the model are at different nodes of a graph", where=str(node.source or ""))

    def within(self, own: Mapping[int, int]) -> SharedGuard:
        """As `Guard.within`."""
        numbers = frozenset(own[node] for node in self.unchecked if node in own)
        return replace(self, unchecked=numbers, own=None if self.own is None else self.own.within(own))
