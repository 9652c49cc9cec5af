"""Memory that a graph must not write: the parameters and buffers of a resident model, which all who use it share.

What the schedule reads off a graph cannot know that a module hands out its own weight, or writes into what it is given. So
memory is compared while the graph runs: a change in place of a weight is refused, and the model gets copies of weights.
"""

from __future__ import annotations

from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.graph.nodes import leaves, map_leaves

if TYPE_CHECKING:
    from collections.abc import Iterable


def memory_of(value: Any) -> frozenset[int]:
    """The addresses of the memory that the tensors in a nested value lie in."""
    addresses = (t.untyped_storage().data_ptr() for t in leaves(value) if isinstance(t, torch.Tensor))
    return frozenset(address for address in addresses if address)  # 0: an empty tensor, or one without data


def apart(value: Any, memory: frozenset[int]) -> Any:
    """The same nested value with those tensors copied that lie in `memory`."""
    if memory.isdisjoint(memory_of(value)):
        return value
    return map_leaves(value, lambda leaf: leaf.clone() if memory_of(leaf) & memory else leaf)


class Weights:
    """The parameters and buffers of a model, and the constants of a graph: what is read and never written."""

    def __init__(self, module: torch.nn.Module, constants: Iterable[torch.Tensor] = ()) -> None:
        self._module, self._constants = module, constants

    @cached_property
    def _memory(self) -> frozenset[int]:
        return memory_of([*chain(self._module.parameters(), self._module.buffers(), self._constants)])

    def hold(self, value: Any) -> bool:
        """Whether a tensor in `value` lies in this memory."""
        return not self._memory.isdisjoint(memory_of(value))

    def apart(self, value: Any) -> Any:
        """`value` with copies of the tensors that lie in this memory, for those who may write into what they get."""
        return apart(value, self._memory)
