"""The cases of `tracing.py` by hand: hooks of PyTorch on the unwrapped model. Each returns what the traced one returns."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn
    from tracing_models import Subject

NEW_TOKENS = 20
OPERATIONS = 30


@contextmanager
def _hooks(*pairs: tuple[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(subject: Subject) -> Any:
    return subject.plain(**subject.inputs, use_cache=False) if subject.language else subject.plain(**subject.inputs)


def _keep(kept: list[torch.Tensor]) -> Callable[..., None]:
    """A hook that keeps the output."""
    return lambda _module, _args, output: kept.append(output)


def untraced(subject: Subject) -> Any:
    with torch.no_grad():
        return _forward(subject)


def _save_layer(subject: Subject, index: int) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    with torch.no_grad(), _hooks((subject.layers(subject.plain)[index], _keep(kept))):
        _forward(subject)
    return kept[0]


def save_last(subject: Subject) -> torch.Tensor:
    return _save_layer(subject, subject.depth - 1)


def save_third(subject: Subject) -> torch.Tensor:
    return _save_layer(subject, subject.depth // 3 - 1)


def save_all(subject: Subject) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    modules = [*subject.layers(subject.plain)] + ([subject.head(subject.plain)] if subject.language else [])
    with torch.no_grad(), _hooks(*((module, _keep(kept)) for module in modules)):
        _forward(subject)
    return kept


def compute(hidden: Any) -> Any:
    """Thirty operations, the same for tensors and for a library's values."""
    for _ in range(OPERATIONS // 3):
        hidden = torch.relu(hidden * 0.5 + 1)
    return hidden


def operations(subject: Subject) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    head, layer = subject.head(subject.plain), subject.layers(subject.plain)[subject.depth // 2]
    with torch.no_grad(), _hooks((layer, lambda _m, _i, out: kept.append(compute(out))), (head, _keep(kept))):
        _forward(subject)
    return kept


def patch(subject: Subject) -> torch.Tensor:
    """Two prompts in one batch: the last position of the first one's middle layer goes into the second's."""
    kept: list[torch.Tensor] = []

    def change(_m: nn.Module, _i: Any, out: torch.Tensor) -> None:
        out[1, -1] = out[0, -1]

    ids = subject.inputs["input_ids"]
    both = {
        "input_ids": torch.cat([ids, ids.flip(1)]),
        "attention_mask": torch.ones(2, ids.shape[1], dtype=torch.int64, device=ids.device),
    }
    layer, head = subject.layers(subject.plain)[subject.depth // 2], subject.head(subject.plain)
    with torch.no_grad(), _hooks((layer, change), (head, _keep(kept))):
        subject.plain(**both, use_cache=False)
    return kept[0][1:]


def generate(subject: Subject) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    with torch.no_grad(), _hooks((subject.layers(subject.plain)[subject.depth // 2], _keep(kept))):
        subject.plain.generate(**subject.inputs, **GENERATION)
    return kept


GENERATION = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}


def gradient(subject: Subject) -> torch.Tensor:
    """The gradient of the sum of the last module's output with respect to the middle layer's output."""
    kept: list[torch.Tensor] = []
    layer, head = subject.layers(subject.plain)[subject.depth // 2], subject.head(subject.plain)
    with _hooks((layer, lambda _m, _i, out: kept.append(out.requires_grad_())), (head, _keep(kept))):
        _forward(subject)
    (found,) = torch.autograd.grad(kept[1].sum(), kept[0])
    return found


def empty(subject: Subject) -> None:
    with torch.no_grad():
        _forward(subject)
