"""The first layers of a deep model, which stand for all: what is learnt of one layer holds for all that are made alike."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

_AT_LEAST = 2
"""The first layer gets what the embedding gives, and only the second what a layer gives."""


def first_layers(tree: nn.Module) -> int:
    """How many layers of a model there are until no new kind of layer comes."""
    needed = _AT_LEAST
    for layers in _lists(tree).values():
        kinds = [_kind(layer) for layer in layers]
        needed = max(needed, *(kinds.index(kind) + 1 for kind in kinds))
    return needed


@contextmanager
def shortened(model: nn.Module, layers: int) -> Iterator[None]:
    """While this lasts, a model has but its first layers."""
    with ExitStack() as stack:
        for part in _lists(model).values():
            stack.callback(setattr, part, "_modules", part._modules)  # noqa: SLF001 - its one table
            part._modules = dict([*part._modules.items()][:layers])  # noqa: SLF001
        yield


def _lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The model's lists of layers: as long as it is deep, and not within one another."""
    config: Any = model.config
    depth = config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for path, part in model.named_modules():
        within = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(part, nn.ModuleList) and len(part) == depth and not within:
            found[path] = part
    return found


def _kind(layer: nn.Module) -> Any:
    """What two layers have to have in common to be alike: modules of the same classes, with parameters of the same shapes."""
    modules = tuple((path, type(part)) for path, part in layer.named_modules())
    return modules, tuple((path, parameter.shape) for path, parameter in layer.named_parameters())
