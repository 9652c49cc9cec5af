"""A sharded model as several graphs see it in one forward: what is gathered for one is there for the others.

All processes have to ask the same of their views, in the same order. Of one graph that follows from its error ending the run
in all of them; here an error ends one graph, and the others go on. So it is noted what was asked, for the end, when the
processes compare it: what they have then is used only if they all did the same.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

from nnsight_hpc.execution.view import Content
from nnsight_hpc.wire.errors import HpcError

if TYPE_CHECKING:
    import torch

    from nnsight_hpc.execution.fake_model import Call
    from nnsight_hpc.execution.view import FullView


class JointView:
    """As the view that it is made of."""

    def __init__(self, view: FullView) -> None:
        self._view = view
        self._last: _Gathered | None = None
        self._asked = 0

    @property
    def keeps(self) -> bool:
        return self._view.keeps

    def prepare(self, call: Call, operations: frozenset[str]) -> None:
        self._note("prepare", *sorted(operations))
        self._view.prepare(call, operations)

    def sharded(self, path: str, side: str) -> bool:
        return self._view.sharded(path, side)

    def whole(self, path: str, side: str, tree: Any, *, root_only: bool = False) -> Any:
        """As `FullView.whole`, gathered by who asks first; what one graph has changed the next one gets without that."""
        if self._last is None or not self._last.serves((path, side), tree, root_only=root_only):
            self._note("whole", path, side, str(root_only))
            whole = self._view.whole(path, side, tree, root_only=root_only)
            self._last = _Gathered((path, side), tree, whole, root_only=root_only)
        return self._last.whole

    def own(self, path: str, side: str, tree: Any) -> Any:
        self._note("own", path, side)
        own = self._view.own(path, side, tree)
        self._last = _Gathered((path, side), own, tree, root_only=False)
        return own

    def parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        # Gathering one may concern some processes only, and they would wait for one of them that is elsewhere.
        self.check_alike("parameter", str(tensor.shape))
        return self._view.parameter(tensor)

    def agree(self, number: int) -> int:
        self._note("agree")
        return self._view.agree(number)

    def check_alike(self, *said: str) -> None:
        """Raise `HpcError` in processes that have asked, or now say, something else than the first."""
        self._note(*said)
        if self._view.agree(self._asked) != self._asked:
            raise HpcError(
                "the processes of the model did different things in a forward that several requests shared",
                why="a request went another way in one of them",
            )

    def _note(self, *asked: str) -> None:
        self._asked = zlib.crc32("\n".join(asked).encode(), self._asked)


class _Gathered:
    """What was gathered last: at which place, of what, and what it was then."""

    def __init__(self, place: tuple[str, str], local: Any, whole: Any, *, root_only: bool) -> None:
        self.whole = whole
        self._place, self._root_only = place, root_only
        self._of, self._as = Content(local), Content(whole)

    def serves(self, place: tuple[str, str], local: Any, *, root_only: bool) -> bool:
        """Whether it is the whole of `local`, and nobody has written into it."""
        complete = root_only or not self._root_only
        return complete and place == self._place and self._of.is_still(local) and self._as.is_still(self.whole)
