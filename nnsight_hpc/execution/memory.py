"""Memory that a graph must not write: the parameters and buffers of a resident model, which all who use it share.

What the schedule reads off a graph cannot know that a module hands out its own weight, or writes into what it is given. So
memory is compared while the graph runs: a change in place of a weight is refused, and the model gets copies of weights.
"""

from __future__ import annotations

from functools import cached_property
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from nnsight_hpc.execution.edges import changes_the_model
from nnsight_hpc.execution.plain import within
from nnsight_hpc.graph.nodes import leaves, map_leaves

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nnsight_hpc.graph.nodes import Node


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor; told by its method, since to import that class takes a third of a second."""
    return hasattr(tensor, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor that is spread over processes (a DTensor) as far as it lies here; any other tensor as it is."""
    if not is_spread(tensor):
        return tensor
    with torch.no_grad():
        part: torch.Tensor = tensor.to_local()
    return part


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
        return _of_module(self._module) | memory_of([*self._constants])

    def hold(self, value: Any) -> bool:
        """Whether a tensor in `value` lies in this memory."""
        return not self._memory.isdisjoint(memory_of(value))

    def refuse_change(self, node: Node, value: Any) -> None:
        """Raise `InvalidGraph` where `node` would change a tensor of this memory in place."""
        if self.hold(within(value)):
            raise changes_the_model(node)

    def apart(self, value: Any) -> Any:
        """`value` with copies of the tensors that lie in this memory, for those who may write into what they get."""
        return apart(value, self._memory)


class _Known:
    """The memory of a module's parameters and buffers as it was looked up, and what shows that it is still the same."""

    def __init__(self, module: torch.nn.Module) -> None:
        parts = [*module.modules()]
        tables = [table for part in parts for table in (part._parameters, part._buffers, part._modules)]  # noqa: SLF001
        self._full, self._empty = [table for table in tables if table], [table for table in tables if not table]
        self._entries = self._seen()
        self._tensors = [local(entry) for entry in self._entries if isinstance(entry, torch.Tensor)]
        self._addresses = [*map(torch.Tensor.data_ptr, self._tensors)]
        plain = [value for part in parts for value in vars(part).values() if type(value) in (torch.Tensor, list, tuple)]
        self.memory = memory_of([*map(local, chain(module.parameters(), module.buffers())), *plain])

    def holds(self) -> bool:
        """Whether nothing was moved, replaced or added since. It is asked at each run that changes something."""
        seen = self._seen()
        return (
            not any(self._empty)
            and len(seen) == len(self._entries)
            and all(map(is_, seen, self._entries))
            and [*map(torch.Tensor.data_ptr, self._tensors)] == self._addresses
        )

    def _seen(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._full))]


_known: WeakKeyDictionary[torch.nn.Module, _Known] = WeakKeyDictionary()


def _of_module(module: torch.nn.Module) -> frozenset[int]:
    """The memory of a module's parameters and buffers; looked up again only where one of them has moved."""
    known = _known.get(module)
    if known is None or not known.holds():
        known = _known[module] = _Known(module)
    return known.memory
