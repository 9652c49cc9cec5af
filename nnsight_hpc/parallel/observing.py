"""What stands at every place of a model in one run, small enough to be sent to the other ranks, and compared."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from hashlib import blake2b
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nnsight_hpc.execution.source import instrumented
from nnsight_hpc.parallel.nested import joined, named_leaves, parameters_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

Place = tuple[str, str]
"""The path of a module (``a.b``) or of an operation inside its forward (``a.b:name``), and ``input`` or ``output``."""
_WAVES = (1.0, 0.7, 2.3)
_ROUNDING = 1e-3


class Seen(NamedTuple):
    """One tensor, or one number, as one rank saw it.

    Attributes
    ----------
    shape
        Of a tensor; None for a number.
    bits
        A digest of all bits: equal where the values are, NaN or not.
    size, sums
        Of floating-point values the root of the sum of squares, and sums with different weights.
    """

    shape: tuple[int, ...] | None
    bits: bytes
    size: float = 0.0
    sums: tuple[float, ...] = ()

    def alike(self, other: Seen) -> bool:
        """Whether two ranks saw the same, but for the order of additions: some kernels of GPUs add in any order."""
        if self.shape != other.shape or self.bits == other.bits:
            return self.shape == other.shape
        limit = _ROUNDING * max(self.size, other.size)
        differences = [abs(a - b) for a, b in zip(self.sums, other.sums, strict=True)]
        return bool(differences) and isfinite(limit) and max(differences) <= limit


def seen(leaf: Any) -> Seen | None:
    """What there is to compare in a leaf; None for what is neither a tensor nor a number."""
    if isinstance(leaf, int):
        return Seen(None, repr(leaf).encode())
    if not isinstance(leaf, torch.Tensor):
        return None
    values = leaf.detach().contiguous().reshape(-1)
    shape, bits = tuple(leaf.shape), blake2b(values.view(torch.uint8).cpu().numpy(), digest_size=16).digest()
    if not values.is_floating_point():
        return Seen(shape, bits)
    values = values.double()
    steps = torch.arange(len(values), device=values.device, dtype=values.dtype)
    sums = torch.stack([values.norm(), *(values @ torch.cos(steps * wave) for wave in _WAVES)]).tolist()
    return Seen(shape, bits, sums[0], tuple(sums[1:]))


@contextmanager
def watched(
    model: torch.nn.Module, operations: Mapping[str, frozenset[str]], note: Callable[[Place, Any], Any]
) -> Iterator[None]:
    """While this lasts, `note` is told what stands at each place, and gives what the model goes on with.

    Parameters
    ----------
    operations
        Names of operations inside of forwards, by the path of the module.
    """

    def before(path: str) -> Callable[..., Any]:
        return lambda _, args, kwargs: note((path, "input"), (args, kwargs))

    def after(path: str) -> Callable[..., Any]:
        return lambda _, _args, output: note((path, "output"), output)

    def inside(path: str) -> Callable[..., Any]:
        def operation(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            args, kwargs = note((f"{path}:{name}", "input"), (args, kwargs))
            return note((f"{path}:{name}", "output"), function(*args, **kwargs))

        return operation

    with ExitStack() as stack:
        for path, module in model.named_modules(remove_duplicate=False):
            for handle in (
                module.register_forward_pre_hook(before(path), with_kwargs=True),
                module.register_forward_hook(after(path)),
            ):
                stack.callback(handle.remove)
        for path, names in operations.items():
            stack.enter_context(instrumented(model.get_submodule(path), names, inside(path)))
        yield


Sights = dict[tuple[Place, int], dict[str, Seen]]
"""By place and number of the call, what was seen in each leaf."""


class Observer:
    """Takes notes of a run of a model.

    Attributes
    ----------
    values, gradients
        What was seen; gradients under the number 0 alone.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.values: Sights = {}
        self.gradients: Sights = {}
        self._calls: Counter[Place] = Counter()
        self._arguments = {path: parameters_of(module) for path, module in model.named_modules(remove_duplicate=False)}

    def look(self, place: Place, value: Any) -> Any:
        """Note what stands at a place."""
        leaves, _ = self._leaves(place, value)
        self.values[place, self._calls[place]] = {
            name: sight for name, leaf in leaves if (sight := seen(leaf)) is not None
        }
        self._calls[place] += 1
        return value

    def differentiate(self, place: Place, value: Any) -> Any:
        """Give every tensor a history, and note its gradient when it comes."""
        leaves, form = self._leaves(place, value)
        return joined([self._followed(place, name, leaf) for name, leaf in leaves], form)

    def _followed(self, place: Place, name: str, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        followed = leaf if leaf.requires_grad else leaf.detach().requires_grad_().clone()
        if not followed.requires_grad:  # the model takes no gradients here
            return leaf
        gradients = self.gradients.setdefault((place, 0), {})

        def note(gradient: torch.Tensor) -> None:
            sight = seen(gradient)
            if sight is not None:
                gradients[name] = sight

        followed.register_hook(note)
        return followed

    def _leaves(self, place: Place, value: Any) -> tuple[list[tuple[str, Any]], Any]:
        path, side = place
        return named_leaves(value, self._arguments.get(path, ()) if side == "input" else None)
