"""Backward passes of a graph: gradients of values read and changed while the backward runs.

What is differentiated is what the graph asks for and nothing else: the weights of a resident model take no gradients, and
get none. A value that is read from the model and has no history yet is given one (`attached`), so that what comes after it
in the model is differentiable.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from types import EllipsisType

    from nnsight_hpc.execution.run import Run


def attached(value: Any) -> Any:
    """The same nested value where every floating-point tensor without a history is replaced by one that begins here."""

    def begin(tensor: torch.Tensor) -> torch.Tensor:
        differentiable = tensor.is_floating_point() or tensor.is_complex()
        if tensor.requires_grad or not differentiable:
            return tensor
        return tensor.detach().requires_grad_().clone()  # a clone: leaves must not be changed in place

    return begin(value) if type(value) is torch.Tensor else tree_map_only(torch.Tensor, begin, value)


class Gradient:
    """The moment at which the gradient of a value is there, and may be replaced."""

    def __init__(self, gradient: torch.Tensor | None, where: slice | EllipsisType) -> None:
        self.gradient, self._where = gradient, where
        self._copied = False

    def get(self, _kind: str) -> Any:
        return None if self.gradient is None else self._own()[self._where]

    def set(self, _kind: str, value: Any) -> None:
        self._own()[self._where] = value

    def _own(self) -> torch.Tensor:
        """A copy: a change in place reaches the rest of the backward, and no one else who holds this gradient."""
        if self.gradient is None:
            raise ValueError("the loss does not depend on this value, so that its gradient cannot be set")
        if not self._copied:
            self.gradient, self._copied = self.gradient.clone(), True
        return self.gradient


def run_backward(run: Run, backward: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Differentiate a loss with regard to all values whose gradient the graph reads or sets in this backward."""
    loss, gradient, keep, again = _options(*args, **kwargs)
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"only a tensor has a backward, and the value is of type {type(loss).__name__}")
    stops = {value: run.schedule.stops.gradients[backward, value] for value in run.schedule.backwards[backward]}
    values: dict[int, list[int]] = defaultdict(list)  # of each whole tensor, the nodes that have it or a part of it
    parts: dict[int, Any] = {}
    whole: dict[int, torch.Tensor] = {}
    for value in stops:
        tensor = _differentiable(run.values[value])
        full, parts[value], _ = run.shared.wholes.get(id(tensor), (tensor, ..., tensor))
        whole[id(full)] = full
        values[id(full)].append(value)
    fired: set[int] = set()

    def fire(key: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        for value in values[key]:
            moment = Gradient(grad, parts[value])
            with torch.enable_grad():  # other nodes may run now, too
                run.fire(moment, stops[value])
            grad = moment.gradient
        fired.add(key)
        return grad

    wanted = [tensor for tensor in whole.values() if tensor.requires_grad]
    leaves = [tensor for tensor in run.shared.tensors.values() if tensor.requires_grad]
    if not wanted and not leaves and not whole:
        raise RuntimeError("no gradient is asked for: read .grad of a value inside the block")
    handles = [tensor.register_hook(functools.partial(fire, id(tensor))) for tensor in wanted]
    try:
        found = (
            torch.autograd.grad(
                loss, wanted + leaves, gradient, retain_graph=keep or again, create_graph=again, allow_unused=True
            )
            if loss.requires_grad
            else ()
        )
    finally:
        for handle in handles:
            handle.remove()
    for leaf, grad in zip(leaves, found[len(wanted) :], strict=False):
        if grad is not None:
            leaf.grad = grad if leaf.grad is None else leaf.grad + grad
    for key in whole.keys() - fired:
        fire(key, None)


def _options(
    loss: Any, gradient: Any = None, *, retain_graph: bool = False, create_graph: bool = False
) -> tuple[Any, Any, bool, bool]:
    return loss, gradient, retain_graph, create_graph


def _differentiable(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        kind = f"{value.dtype} tensors" if isinstance(value, torch.Tensor) else f"values of type {type(value).__name__}"
        raise TypeError(f"{kind} have no gradient")
    return value
