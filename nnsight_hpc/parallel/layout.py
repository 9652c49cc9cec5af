"""How one tensor is spread over the ranks, and the ways between a rank's part and the whole: both differentiable.

A value of the unsharded model has a part on each rank. Of a whole value, all ranks calculate the same, so its gradient is
whole on each of them. Where ranks hold copies of one part, each goes on with it alone, and so has a part of its gradient: the
gradient of the whole is the sum over the copies, and a gradient of the whole is divided among them. Hence

=========  =========================  ===========================================
           forward                    backward
=========  =========================  ===========================================
whole      gather one of the copies   this rank's slice, divided by the copies
own        this rank's slice          gather, summed over the copies
=========  =========================  ===========================================

Collectives are those of the default process group. What comes out is memory of its own, on the model's stream, so that
nothing that is kept changes when a buffer is used again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""The one has taken the place of the other in torch 2.13."""


class Part(Protocol):
    """What is known of one tensor of which ranks do not all hold, or go on with, the same."""

    def whole(self, local: Tensor, *, root_only: bool = False) -> Tensor:
        """The whole tensor, from all ranks' own; collective. With `root_only` others than rank 0 get its shape alone."""

    def own(self, whole: Tensor) -> Tensor:
        """What this rank has of a whole tensor; collective in the backward only."""


class _Linear(Protocol):
    """The three linear maps of which `whole` and `own`, and what they are backwards, are made."""

    copies: int

    def gathered(self, local: Tensor) -> Tensor: ...
    def summed(self, local: Tensor) -> Tensor: ...
    def sliced(self, whole: Tensor) -> Tensor: ...


class _Whole(torch.autograd.Function):  # type: ignore[misc]  # mypy does not look into torch
    @staticmethod
    def forward(ctx: Any, local: Tensor, how: _Linear) -> Tensor:
        ctx.how = how
        return how.gathered(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own, copies = _Own.apply(grad, ctx.how), ctx.how.copies
        return own if copies == 1 else own / copies, None


class _Own(torch.autograd.Function):  # type: ignore[misc]  # as above
    @staticmethod
    def forward(ctx: Any, whole: Tensor, how: _Linear) -> Tensor:
        ctx.how = how
        return how.sliced(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Summed.apply(grad, ctx.how), None


class _Summed(torch.autograd.Function):  # type: ignore[misc]  # as above
    @staticmethod
    def forward(ctx: Any, local: Tensor, how: _Linear) -> Tensor:
        ctx.how = how
        return how.summed(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Own.apply(grad, ctx.how), None


@dataclass(frozen=True)
class Layout:
    """A tensor that is cut along one dimension.

    Attributes
    ----------
    dim
        Counted from the end (-1 is the last), so that it holds for any number of leading dimensions.
    sizes
        Of each rank's slice.
    packed
        How many parts lie one after another in the dimension, each of them cut by itself (GPT-2's q, k and v: 3).
    copies
        How many neighbouring ranks hold the same slice (key/value heads fewer than ranks).
    """

    dim: int
    sizes: tuple[int, ...]
    packed: int = 1
    copies: int = 1

    @property
    def total(self) -> int:
        """The size of the whole."""
        return sum(self.sizes) // self.copies

    def whole(self, local: Tensor, *, root_only: bool = False) -> Tensor:
        size, expected = size_in(local, self.dim), self.sizes[dist.get_rank()]
        if size != expected:
            raise ValueError(f"a rank has {size} entries in dimension {self.dim}, where {expected} were seen before")
        return self._for_root(local) if root_only else cast("Tensor", _Whole.apply(local, self))

    def own(self, whole: Tensor) -> Tensor:
        size = size_in(whole, self.dim)
        if size == self.total:
            return cast("Tensor", _Own.apply(whole, self))
        if size == 1:  # the model broadcasts it over what it has, which is a part here
            return Same(len(self.sizes)).own(whole)
        raise ValueError(f"a value has {size} entries in dimension {self.dim}, where the model has {self.total}")

    def gathered(self, local: Tensor) -> Tensor:
        return self._joined(self._blocks(local)[:: self.copies])

    def summed(self, local: Tensor) -> Tensor:
        blocks, copies = self._blocks(local), self.copies
        return self._joined([sum(blocks[n + 1 : n + copies], blocks[n]) for n in range(0, len(blocks), copies)])

    def sliced(self, whole: Tensor) -> Tensor:
        sizes, index = self.sizes[:: self.copies], dist.get_rank() // self.copies
        start, length = sum(sizes[:index]) // self.packed, sizes[index] // self.packed
        own = [part.narrow(self.dim, start, length) for part in whole.chunk(self.packed, self.dim)]
        return torch.cat(own, self.dim) if len(own) > 1 else own[0].clone(memory_format=torch.contiguous_format)

    def _blocks(self, local: Tensor) -> list[Tensor]:
        """The slices of all ranks."""
        block = self._padded(local)
        received = block.new_empty(len(self.sizes), *block.shape)
        _all_gather(received, block)
        return self._cut(received.unbind())

    def _for_root(self, local: Tensor) -> Tensor:
        block = self._padded(local)
        if dist.get_rank():
            dist.gather(block, dst=0)
            shape = [*local.shape]
            shape[self.dim] = self.total
            return block.new_zeros(()).expand(shape)
        received = [torch.empty_like(block) for _ in self.sizes]
        dist.gather(block, received, dst=0)
        return self._joined(self._cut(received)[:: self.copies])

    def _padded(self, local: Tensor) -> Tensor:
        """A rank's slice as long as the longest: a gather wants all alike."""
        local, missing = local.detach(), max(self.sizes) - local.shape[self.dim]
        if not missing:
            return local.contiguous()
        shape = [*local.shape]
        shape[self.dim] = missing
        return torch.cat([local, local.new_zeros(shape)], self.dim)

    def _cut(self, blocks: Sequence[Tensor]) -> list[Tensor]:
        return [block.narrow(self.dim, 0, size) for block, size in zip(blocks, self.sizes, strict=True)]

    def _joined(self, slices: Sequence[Tensor]) -> Tensor:
        """The slices of the whole in its order, in memory of its own."""
        if self.packed > 1:
            parts = [one.chunk(self.packed, self.dim) for one in slices]
            slices = [part[number] for number in range(self.packed) for part in parts]
        return torch.cat([*slices], self.dim)


@dataclass(frozen=True)
class Same:
    """A tensor that is whole on every rank, which goes on with it for its own part alone (positions, for its own heads).

    So each rank has but a part of its gradient.
    """

    copies: int

    def whole(self, local: Tensor, *, root_only: bool = False) -> Tensor:  # noqa: ARG002 - nothing is gathered
        return cast("Tensor", _Whole.apply(local, self)) if torch.is_grad_enabled() else local

    def own(self, whole: Tensor) -> Tensor:
        return cast("Tensor", _Own.apply(whole, self)) if torch.is_grad_enabled() else whole

    def gathered(self, local: Tensor) -> Tensor:
        return local.clone()

    def sliced(self, whole: Tensor) -> Tensor:
        return whole.clone()

    def summed(self, local: Tensor) -> Tensor:
        total = local.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


@dataclass(frozen=True)
class Either:
    """A tensor that is cut otherwise in one call than in another (keys before or after they are repeated): sizes tell."""

    layouts: tuple[Layout, ...]

    def whole(self, local: Tensor, *, root_only: bool = False) -> Tensor:
        fitting = [one for one in self.layouts if one.sizes[dist.get_rank()] == size_in(local, one.dim)]
        return self._one(fitting, local).whole(local, root_only=root_only)

    def own(self, whole: Tensor) -> Tensor:
        fitting = [one for one in self.layouts if one.total == size_in(whole, one.dim)]
        return self._one(fitting, whole).own(whole)

    @staticmethod
    def _one(fitting: Sequence[Layout], tensor: Tensor) -> Layout:
        if len(fitting) != 1:
            raise ValueError(f"it is not known how a tensor of {list(tensor.shape)} is cut here: {fitting}")
        return fitting[0]


@dataclass(frozen=True)
class Hidden:
    """A value of which ranks hold what cannot be put together, and why."""

    why: str


def size_in(tensor: Tensor, dim: int) -> int:
    """The size in a dimension counted from the end; 1 where a tensor has fewer, as in broadcasting."""
    return tensor.shape[dim] if tensor.ndim >= -dim else 1
