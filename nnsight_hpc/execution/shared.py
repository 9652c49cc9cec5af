"""What a run and the runs of its loops have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.memory import Weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Shared:
    """The model, the constants, and who is told and asked while the graph runs."""

    def __init__(  # noqa: PLR0917 - called in one place
        self,
        module: torch.nn.Module,
        tensors: Mapping[str, torch.Tensor],
        cancelled: Callable[[], bool] | None,
        log: Callable[[str, str], None],
        functions: Sequence[Callable[..., Any]],
        gradients: bool,
    ) -> None:
        self.module, self.log, self.functions, self.gradients = module, log, functions, gradients
        self.cancelled = cancelled
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self.weights = Weights(module, self.tensors.values())
        self.in_call = False
        self.wholes: dict[int, tuple[torch.Tensor, slice, torch.Tensor]] = {}
        self.parts: dict[str, torch.nn.Module] = {}

    def note_whole(self, part: torch.Tensor, whole: torch.Tensor, where: slice) -> None:
        """Remember of which tensor `part` is a part: gradients are those of the whole."""
        self.wholes[id(part)] = (whole, where, part)
