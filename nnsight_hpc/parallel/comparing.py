"""From what all ranks saw of one tensor, and its shape in the unsharded model, to how it is spread over them."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nnsight_hpc.parallel.layout import Either, Hidden, Layout, Same

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.parallel.layout import Part
    from nnsight_hpc.parallel.observing import Seen

    Known = Part | Hidden | None


class Whole(NamedTuple):
    """A tensor or number of the unsharded model.

    Attributes
    ----------
    shape
        Of a tensor; None for a number.
    number
        What it is, as text.
    """

    shape: tuple[int, ...] | None
    number: str = ""


def whole_of(leaf: Any) -> Whole | None:
    """What there is to compare in a leaf of the unsharded model; None where the fake run does not show it."""
    if isinstance(leaf, torch.Tensor):
        return Whole(tuple(leaf.shape))
    return Whole(None, repr(leaf)) if isinstance(leaf, int) else None


def equal(ranks: Sequence[Seen | None]) -> bool:
    """Whether all ranks saw the same, if anything."""
    return all(one is first if one is None or first is None else first.alike(one) for first, one in pairwise(ranks))


def compared(whole: Whole | None, ranks: Sequence[Seen | None], varying: Sequence[int]) -> Known:
    """How one tensor or number is spread over the ranks; None where it is whole on each.

    Parameters
    ----------
    whole
        What it is in the unsharded model; None where a fake run does not show it.
    ranks
        What each rank saw.
    varying
        Sizes that change from call to call (batch and tokens): primes that divide no size of the model.
    """
    sights = [one for one in ranks if one is not None]
    if len(sights) < len(ranks):
        return Hidden("not every rank has it")
    first, alike = sights[0], equal(sights)
    if whole is None:
        return None if alike else Hidden("ranks hold different values, and what the whole would be is not known")
    if whole.shape is None or first.shape is None:
        mine = alike and first.shape is None and first.bits == whole.number.encode()
        return None if mine else Hidden("it is a number that has to do with a rank's own part")
    shapes = [one.shape for one in sights if one.shape is not None]
    if any(len(shape) != len(whole.shape) for shape in shapes):
        return Hidden(f"ranks hold tensors of {len(first.shape)} dimensions, and the whole has {len(whole.shape)}")
    dims = [dim for dim, size in enumerate(whole.shape) if any(shape[dim] != size for shape in shapes)]
    if not dims:
        return None if alike else Hidden("each rank holds a part of a sum, which is added up later in the model")
    if len(dims) > 1:
        return Hidden(f"it is cut along {len(dims)} dimensions")
    return _cut(whole.shape[dims[0]], dims[0] - len(whole.shape), sights, varying)


def _cut(total: int, dim: int, ranks: Sequence[Seen], varying: Sequence[int]) -> Layout | Hidden:
    sizes = tuple(one.shape[dim] for one in ranks if one.shape is not None)
    copies = sum(sizes) // max(total, 1)
    groups = [ranks[n : n + copies] for n in range(0, len(ranks), copies)] if copies else []
    if sum(sizes) != copies * total or not copies or not all(map(equal, groups)):
        return Hidden(f"ranks hold {', '.join(map(str, sizes))} entries of {total}, which do not make up the whole")
    if any(total % size == 0 for size in varying):
        return Hidden("it is cut along a dimension that has prompts or tokens, too")
    return Layout(dim, sizes, copies=copies)


def merged(one: Known, other: Known) -> Known:
    """What holds for a leaf of which two calls have said something. Gradients are not known of every call."""
    if one == other:
        return one
    known = [part for part in (one, other) if part is not None]
    hidden = next((part for part in known if isinstance(part, Hidden)), None)
    if hidden or (len(known) == 1 and isinstance(known[0], Same)):
        return hidden or known[0]
    layouts = [layout for part in known for layout in (part.layouts if isinstance(part, Either) else (part,))]
    cuts = tuple(dict.fromkeys(layout for layout in layouts if isinstance(layout, Layout)))
    if len(known) == 2 and len(cuts) == len(set(layouts)):
        return Either(cuts)
    return Hidden("it is spread over the ranks in one call of its module otherwise than in another")
