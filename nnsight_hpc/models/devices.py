"""Where a model computes."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable


def device_of(module: torch.nn.Module, given: Iterable[torch.Tensor] = ()) -> torch.device:
    """The device of a module's first parameter, or else buffer.

    A module without either computes where the tensors are that it is `given`; without those, on the CPU. A module on several
    GPUs takes its inputs on that of its first parameter, and moves what goes on (accelerate does this).
    """
    tensors = (_first(module, table) for table in ("_parameters", "_buffers"))
    return next((tensor.device for tensor in chain(tensors, given) if tensor is not None), torch.device("cpu"))


def _first(module: torch.nn.Module, table: str) -> torch.Tensor | None:
    """The first of ``module.parameters()``, or of its buffers. At each trace it is asked for, and those generators are slow."""
    for tensor in getattr(module, table).values():
        if tensor is not None:
            return tensor
    for child in module._modules.values():  # noqa: SLF001 - named_children() is one of them
        if child is not None and (found := _first(child, table)) is not None:
            return found
    return None
