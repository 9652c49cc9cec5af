"""What a run and the runs of its loops have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.execution.memory import Weights, memory_of
from nnsight_hpc.execution.rows import only_for_all
from nnsight_hpc.models.devices import device_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from nnsight_hpc.execution.changes import Changes
    from nnsight_hpc.execution.rows import Index
    from nnsight_hpc.execution.view import FullView
    from nnsight_hpc.graph.nodes import Node


class Shared:
    """The model, the constants, and who is told and asked while the graph runs.

    Attributes
    ----------
    unwanted
        What the graph saves and this process does not keep.
    """

    def __init__(  # noqa: PLR0917 - called in one place
        self,
        module: torch.nn.Module,
        tensors: Mapping[str, torch.Tensor],
        cancelled: Callable[[], bool] | None,
        log: Callable[[str, str], None],
        objects: Sequence[Any],
        gradients: bool,
        changes: Changes,
        view: FullView | None,
    ) -> None:
        self.module: torch.nn.Module = module
        self.objects: Sequence[Any] = objects
        self.log, self.gradients = log, gradients
        self.cancelled, self.changes, self.view = cancelled, changes, view
        self.device = device_of(module, tensors.values())
        self.tensors = {name: _sent(tensor, self.device) for name, tensor in tensors.items()}
        self.weights = Weights(module, self.tensors.values())
        self.in_call = False
        self.wholes: dict[int, tuple[torch.Tensor, Index, torch.Tensor]] = {}
        self._common: list[torch.Tensor] = []
        self.parts: dict[str, torch.nn.Module] = {}
        self.unwanted: frozenset[int] = frozenset()

    def keeps(self, save: int) -> bool:
        """Whether what the graph saves by a node is kept in this process."""
        return (self.view is None or self.view.keeps) and save not in self.unwanted

    def decide(self, condition: Any) -> bool:
        """Whether a condition holds: the same in all processes that run the graph."""
        return bool(condition) if self.view is None else bool(self.view.agree(bool(condition)))

    def note_whole(self, part: torch.Tensor, whole: torch.Tensor, where: Index) -> None:
        """Remember of which tensor `part` is a part: gradients are those of the whole."""
        self.wholes[id(part)] = (whole, where, part)

    def common(self, whole: torch.Tensor) -> torch.Tensor:
        """The copy for one invoke of a tensor that is the same for all of them."""
        self._common.append(whole.clone())
        return self._common[-1]

    def refuse_change(self, node: Node, value: Any) -> None:
        """Raise where `node` would change in place a weight of the model, or what is the same for all invokes."""
        self.weights.refuse_change(node, value)
        if self._common and memory_of(value) & memory_of(self._common):
            raise only_for_all(value)


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the model's device.

    A GPU is sent what lies in ordinary memory without waiting for what it still computes: CUDA has copied it when the call
    returns (cudaMemcpyAsync). Pinned memory is read later, when it may have been changed.
    """
    at_once = device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned()
    return tensor.to(device, non_blocking=at_once)
