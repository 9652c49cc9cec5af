"""Views that are wrong on purpose.

Most are what a mistake in learning where tensors are split would look like: each keeps all sizes right, so that nothing fails
by itself, and whole values are merely wrong.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import OutOfMemoryError

from nnsight_hpc.parallel.layout import Layout
from nnsight_hpc.parallel.view import ShardedView

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from nnsight_hpc.parallel.layout import Part


class Backwards(Layout):
    """The ranks' slices are joined in the wrong order."""

    def _joined(self, slices: Sequence[Tensor]) -> Tensor:
        return super()._joined(slices[::-1])


class Elsewhere(Layout):
    """Each rank goes on with its slice, turned by one entry."""

    def sliced(self, whole: Tensor) -> Tensor:
        return super().sliced(whole).roll(1, self.dim)


def _view(wrong: Callable[[Layout], Layout]) -> type[ShardedView]:
    class Wrong(ShardedView):
        def _parts(self, path: str, side: str) -> Mapping[str, Part | None] | None:
            parts = super()._parts(path, side)
            if parts is None:
                return None
            return {name: wrong(part) if isinstance(part, Layout) else part for name, part in parts.items()}

    return Wrong


def _as(kind: type[Layout], layout: Layout) -> Layout:
    return kind(**{field.name: getattr(layout, field.name) for field in fields(Layout)})


class FailsOnOneRank(ShardedView):
    """Whoever looks at a query projection fails on all ranks but the first."""

    error: Exception = ValueError("a rank has no query projection")

    def whole(self, path: str, side: str, tree: Any, *, root_only: bool = False) -> Any:
        if path.endswith("q_proj") and not self.keeps:
            raise self.error
        return super().whole(path, side, tree, root_only=root_only)


class NoMemoryOnOneRank(FailsOnOneRank):
    """As `FailsOnOneRank`; the memory does not suffice."""

    error = OutOfMemoryError("a rank has no memory for it")


VIEWS = {
    "ShardedView": ShardedView,
    "JoinedBackwards": _view(partial(_as, Backwards)),
    "TakenElsewhere": _view(partial(_as, Elsewhere)),
    # GPT-2's queries, keys and values are taken for one tensor, and each rank's part for a third of it and not of each.
    "NotPacked": _view(partial(replace, packed=1)),
    "FailsOnOneRank": FailsOnOneRank,
    "NoMemoryOnOneRank": NoMemoryOnOneRank,
}
