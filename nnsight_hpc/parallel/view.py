"""The whole of a tensor-parallel model for those who run a graph on it: fills the protocol `execution.view.FullView`."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from nnsight_hpc.parallel.layout import Hidden, Same
from nnsight_hpc.parallel.learning import Learning
from nnsight_hpc.parallel.nested import mapped
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from nnsight_hpc.execution.fake_model import Call
    from nnsight_hpc.parallel.comparing import Known
    from nnsight_hpc.parallel.layout import Part
    from nnsight_hpc.parallel.world import World


_STEP = re.compile(r"^(\['\w+'\])\[\d+\](?=\[)")
"""In the result of a generation, what the model put out at each step (attention weights): by step, then as in a forward."""
_UNSEEN = Hidden("no tensor was there in the small call of the model from which it was learnt what each rank holds")


class ShardedView:
    """A model that is spread over the ranks of a world, seen as one. Creating it is collective, and learns where what is.

    Every method that is collective has to be called by all ranks in the same order.

    Parameters
    ----------
    module
        The model on this rank, as `load_parallel` gives it.
    unsharded
        Its module tree on the meta device (`models.module_tree`), with the same attention implementation.

    Attributes
    ----------
    keeps
        Whether what a graph saves is kept on this rank: on rank 0, or on all.
    all_keep
        Whether it is on all.
    """

    def __init__(self, world: World, module: nn.Module, unsharded: nn.Module) -> None:
        self.keeps, self.all_keep = world.rank == 0, False
        self._device = world.device
        self._learning = Learning(module, unsharded)

    def kept_by_all(self) -> Self:
        """The same view, by which every rank keeps what a graph saves."""
        other = copy.copy(self)
        other.keeps = other.all_keep = True
        return other

    def prepare(self, call: Call, operations: frozenset[str]) -> None:
        """Learn what such a call, and these operations inside of forwards, need; collective where that is new."""
        self._learning.prepare(call, operations)

    def sharded(self, path: str, side: str) -> bool:
        """Whether anything at a place is not whole, or not known; with gradients on, whether its gradient is not."""
        parts = self._parts(path, side)
        if parts is None:
            return True
        gradients = torch.is_grad_enabled()
        return any(part is not None and (gradients or not isinstance(part, Same)) for part in parts.values())

    def whole(self, path: str, side: str, tree: Any, *, root_only: bool = False) -> Any:
        """The nested value at a place with every tensor whole, differentiably; collective.

        With `root_only` ranks that keep nothing get tensors of the right shape, without memory.

        Raises
        ------
        InvalidGraph
            Something at the place cannot be put together.
        """
        root_only = root_only and not self.all_keep
        return self._mapped(path, side, tree, lambda part, leaf: part.whole(leaf, root_only=root_only))

    def own(self, path: str, side: str, tree: Any) -> Any:
        """What this rank has of a nested value that is whole, differentiably; its backward is collective.

        Raises
        ------
        InvalidGraph
            Something at the place cannot be taken apart.
        ValueError
            A tensor is not as large as the model's.
        """
        return self._mapped(path, side, tree, lambda part, leaf: part.own(leaf))

    def parameter(self, tensor: Tensor) -> Tensor:
        """The whole of a parameter or buffer; collective for one that is split."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def agree(self, number: int) -> int:
        """The number of rank 0 on all ranks, of 64 bits; collective."""
        said = torch.tensor(number, dtype=torch.int64, device=self._device)
        dist.broadcast(said, src=0)
        return int(said.item())

    def _parts(self, path: str, side: str) -> Mapping[str, Known] | None:
        """What is known of the leaves at a place; None where nothing is."""
        return self._learning.places.get(self._learning.place_of(path, side))

    def _mapped(self, path: str, side: str, tree: Any, change: Callable[[Part, Any], Any]) -> Any:
        """The nested value in which `change` is made to each tensor that is not whole on every rank."""
        parts = self._parts(path, side)

        def changed(name: str, leaf: Any) -> Any:
            tensor = isinstance(leaf, torch.Tensor)
            if not tensor and not isinstance(leaf, int):
                return leaf
            known = name if path else _STEP.sub(r"\1", name)
            part = (parts or {}).get(known, _UNSEEN if tensor and (path or known != name) else None)
            if isinstance(part, Hidden):
                raise _refused(path, side, part.why)
            return change(part, leaf) if tensor and part is not None else leaf

        return mapped(tree, changed, self._learning.arguments_of(path) if side == "input" else None)


def _refused(path: str, side: str, why: str) -> InvalidGraph:
    return InvalidGraph(
        f"the {side} of {path} cannot be read or set in a model that is spread over ranks",
        where=path,
        why=why,
        next="use the output of the module around it, or run the model in one process",
    )
