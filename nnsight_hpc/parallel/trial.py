"""One small call of a model on all ranks, and of the unsharded model on fakes: what stands where in each."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map_only

from nnsight_hpc.execution.fake_model import Call, Twin, twin_of
from nnsight_hpc.parallel.comparing import whole_of
from nnsight_hpc.parallel.depth import first_layers, shortened
from nnsight_hpc.parallel.nested import named_leaves, parameters_of
from nnsight_hpc.parallel.observing import Observer, watched
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from nnsight_hpc.parallel.comparing import Whole
    from nnsight_hpc.parallel.observing import Place, Sights


class Outcome(NamedTuple):
    """What was found.

    Attributes
    ----------
    values, gradients
        What each rank saw.
    wholes
        By place, for each call, the leaves of the unsharded model by name.
    """

    values: Sequence[Sights]
    gradients: Sequence[Sights]
    wholes: Mapping[Place, Sequence[Mapping[str, Whole]]]


class Trials:
    """Runs small calls.

    Parameters
    ----------
    module, unsharded
        As for `Learning`.

    Attributes
    ----------
    arguments
        By path, the names of the positional arguments of each module.
    """

    def __init__(self, module: nn.Module, unsharded: nn.Module) -> None:
        self._module = module
        self.arguments = {path: parameters_of(part) for path, part in module.named_modules(remove_duplicate=False)}
        self._layers = first_layers(unsharded)
        with shortened(unsharded, self._layers):
            self._short = Twin(unsharded, next(module.parameters()).device)

    def run(self, call: Call, operations: Mapping[str, frozenset[str]], *, deep: bool) -> Outcome:
        """Run a call; collective.

        Parameters
        ----------
        operations
            Names of operations inside of forwards that are looked at, too, by module.
        deep
            Whether all layers are run; otherwise the first ones of each kind.
        """
        if deep:
            return self._run(call, operations, twin_of(self._module))
        with shortened(self._module, self._layers):
            return self._run(call, operations, self._short)

    def _run(self, call: Call, operations: Mapping[str, frozenset[str]], twin: Twin) -> Outcome:
        observer = Observer(self._module)
        device = next(self._module.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)  # a generation may draw
            with torch.no_grad(), watched(self._module, operations, observer.look):
                self._call(call)
        if not call.generate:
            with torch.enable_grad(), watched(self._module, operations, observer.differentiate):
                leaves = tree_leaves(self._call(call))
                tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
                sum(tensor.float().square().mean() for tensor in tensors).backward()
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (observer.values, observer.gradients))
        values, gradients = zip(*ranks, strict=True)
        return Outcome(values, gradients, self._wholes(call, operations, twin))

    def _call(self, call: Call) -> Any:
        return (self._module.generate if call.generate else self._module)(*call.args, **call.kwargs)

    def _wholes(
        self, call: Call, operations: Mapping[str, frozenset[str]], twin: Twin
    ) -> Mapping[Place, Sequence[Mapping[str, Whole]]]:
        with twin.active():
            args, kwargs = tree_map_only(
                torch.Tensor,
                lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=twin.device),
                (call.args, call.kwargs),
            )
        paths = frozenset(f"{path}:{name}" for path, names in operations.items() for name in names)
        try:
            recording = twin.record(Call(args, kwargs, call.generate), paths)
        except Exception as error:
            raise InvalidInput(
                "it cannot be found out which rank holds what of the model's tensors in such a call",
                where=type(self._module).__name__,
                why=f"the unsharded model does not run on fake tensors: {twin.why or f'{type(error).__name__}: {error}'}",
                next="call the model in another way, or run it in one process",
            ) from error
        found: dict[Place, list[dict[str, Whole]]] = defaultdict(list)
        for (path, kind, _), value in recording.points.items():
            side, arguments = ("output", None) if kind == "output" else ("input", self.arguments.get(path, ()))
            leaves, _ = named_leaves(value, arguments)
            found[path, side].append({name: whole for name, leaf in leaves if (whole := whole_of(leaf)) is not None})
        return found
