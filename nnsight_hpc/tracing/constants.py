"""What a researcher hands to an operation, as the constants that a graph holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.graph import Device, DType, TensorRef
from nnsight_hpc.graph.nodes import Seed
from nnsight_hpc.tracing.value import Value

if TYPE_CHECKING:
    from collections.abc import Callable

_PLAIN = frozenset({type(None), bool, int, float, complex, str, type(...)})


class Constants:
    """The tensors of one recording by name, and everything else that is no value of a node in its form for the graph."""

    def __init__(self, *, attached: bool, prefix: str = "t") -> None:
        self._prefix = prefix
        self.tensors: dict[str, torch.Tensor] = {}
        self._attached = attached
        self._draws = 0
        self._names: dict[int, tuple[torch.Tensor, int, str]] = {}

    def encode(self, value: Any, other: Callable[[Any], Any]) -> Any:  # noqa: C901, PLR0911, PLR0912 - one case a type
        """`value` as an argument of a node; `other` says what stands for a leaf that is no constant, or refuses it."""
        kind = type(value)
        if kind is Value:
            return other(value)
        if kind in _PLAIN:
            return value
        if kind is tuple:
            return tuple([self.encode(item, other) for item in value])
        if kind is list or kind is range:
            return [self.encode(item, other) for item in value]
        if kind is slice:
            return slice(*[self.encode(part, other) for part in (value.start, value.stop, value.step)])
        if kind is dict:
            return {key: self.encode(item, other) for key, item in value.items()}
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, torch.dtype):
            return DType(str(value).removeprefix("torch."))
        if isinstance(value, torch.device):
            return Device(str(value))
        if isinstance(value, torch.Generator):
            self._draws += 1
            return Seed((value.initial_seed() + self._draws - 1) % 2**63)  # its second use draws other numbers
        if isinstance(value, tuple | list | dict):
            plain = next(base for base in (tuple, list, dict) if isinstance(value, base))
            return self.encode(plain(value), other)
        if isinstance(value, bool | int | float | complex | str):
            return value
        if hasattr(kind, "__array__"):  # numpy: a number, or a tensor
            return value.item() if getattr(value, "ndim", 1) == 0 else self._tensor(torch.as_tensor(value))
        return other(value)

    def adopt(self, tensor: torch.Tensor, name: str = "") -> TensorRef:
        """The tensor by a name of its own, or the next one; not copied: nobody changes it."""
        known = self._names.get(id(tensor))
        name = name or (f"{self._prefix}{len(self.tensors)}" if known is None else known[2])
        self.tensors[name] = tensor
        self._names[id(tensor)] = (tensor, _version(tensor), name)
        return TensorRef(name)

    def _tensor(self, tensor: torch.Tensor) -> TensorRef:
        """The tensor by name, as it is now: a change that the researcher makes to it later in the block is not seen."""
        version = _version(tensor)
        known = self._names.get(id(tensor))
        if known is not None and known[1] == version and not tensor.is_inference():
            return TensorRef(known[2])
        name = f"{self._prefix}{len(self.tensors)}"
        self.tensors[name] = self.kept(tensor)
        self._names[id(tensor)] = (tensor, version, name)
        return TensorRef(name)

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it is now, for a recording that outlives this line."""
        if not tensor.requires_grad:
            return tensor.detach() if isinstance(tensor, torch.nn.Parameter) else tensor.clone()
        if self._attached and torch.is_grad_enabled():
            return tensor  # training: the optimiser's own tensor, or what was computed from it
        return tensor.detach() if isinstance(tensor, torch.nn.Parameter) else tensor.detach().clone()


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place, as far as torch counts it."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch's own count
