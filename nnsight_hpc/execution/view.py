"""Models whose tensors are spread over several processes: what a run asks of those who know how, to see whole ones.

Each process runs the same graph. Where it stands at a sharded tensor, the whole one is gathered, the graph's nodes run on
all processes alike, and each takes its part again. `nnsight_hpc.parallel` fills the protocol.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nnsight_hpc.graph.nodes import leaves

if TYPE_CHECKING:
    from nnsight_hpc.execution.fake_model import Call


class FullView(Protocol):
    """A sharded model as if it were whole. All processes call the same methods in the same order.

    A place is the path of a module, or of an operation inside its forward (``model.layers.0.self_attn:q_proj_0``), and a side:
    ``input``, where a value is a pair of arguments and keywords, or ``output``.

    Attributes
    ----------
    keeps
        Whether what a graph saves is kept in this process; it is in one.
    """

    @property
    def keeps(self) -> bool: ...

    def prepare(self, call: Call, operations: frozenset[str]) -> None:
        """Find out what is sharded in such a call of the model, and in these operations inside of forwards."""

    def sharded(self, path: str, side: str) -> bool:
        """Whether some tensor at a place is sharded, or cannot be shown."""

    def whole(self, path: str, side: str, tree: Any, *, root_only: bool = False) -> Any:
        """The nested value at a place with every sharded tensor gathered, differentiably.

        With `root_only` those processes that keep nothing may get tensors of the right shape, and any content, instead.
        """

    def own(self, path: str, side: str, tree: Any) -> Any:
        """The part of a whole value that this process goes on with, differentiably."""

    def parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole of a parameter or buffer."""

    def agree(self, number: int) -> int:
        """The first process's number in all of them, whose arithmetic may differ in the last bits (a GPU's atomic sums)."""


class ShardedPlace:
    """A place of a model where something is sharded."""

    def __init__(self, view: FullView, path: str, side: str) -> None:
        self._view, self._path, self._side = view, path, side

    def whole(self, tree: Any, *, root_only: bool = False) -> Any:
        return self._view.whole(self._path, self._side, tree, root_only=root_only)

    def own(self, tree: Any) -> Any:
        return self._view.own(self._path, self._side, tree)


class Visit:
    """The model is at a sharded place: its value is gathered if a node asks for it, and taken apart again if it has to be.

    Attributes
    ----------
    seen
        Whether the value that nodes have to do with is the whole one by now.
    """

    __slots__ = ("_before", "_local", "_place", "_root_only", "seen")

    def __init__(self, place: ShardedPlace, local: Any, *, root_only: bool) -> None:
        self._place, self._local, self._root_only = place, local, root_only
        self._before: Content | None = None
        self.seen = False

    def whole(self) -> Any:
        """The whole value; to be asked for once."""
        self.seen = True
        whole = self._place.whole(self._local, root_only=self._root_only)
        if not torch.is_grad_enabled():  # else what comes later has to go through the whole one, to reach its gradient
            self._before = Content(whole)
        return whole

    def left(self, tree: Any) -> Any:
        """What the model goes on with: its own value where nothing has changed it, so that a look changes nothing."""
        if not self.seen:
            return tree
        if self._before is not None and self._before.is_still(tree):
            return self._local
        return self._place.own(tree)


class Content:
    """What a nested value consists of now, and how often each tensor in it was written into."""

    __slots__ = ("_leaves", "_versions")

    def __init__(self, tree: Any) -> None:
        self._leaves = [*leaves(tree)]
        self._versions = [leaf._version for leaf in self._leaves if isinstance(leaf, torch.Tensor)]  # noqa: SLF001 - torch's one counter

    def is_still(self, tree: Any) -> bool:
        """Whether a nested value consists of the very same, which nobody has written into since."""
        now = Content(tree)
        same = len(now._leaves) == len(self._leaves) and all(map(is_, now._leaves, self._leaves))
        return same and now._versions == self._versions
