"""The cases of `tracing.py` in nnsight (0.8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import nnsight
import torch
from nnsight import NNsight
from nnsight.modeling.transformers import TransformersModel
from tracing_hooks import GENERATION, NEW_TOKENS, compute

if TYPE_CHECKING:
    from torch import nn
    from tracing_models import Subject

VERSION = nnsight.__version__


def wrap(module: nn.Module, tokenizer: Any) -> Any:
    return NNsight(module) if tokenizer is None else TransformersModel(module, tokenizer=tokenizer)


def _trace(subject: Subject) -> Any:
    if subject.language:
        return subject.wrapped.trace(subject.inputs["input_ids"], use_cache=False)
    return subject.wrapped.trace(subject.inputs["input"])


def module_of(model: Any) -> nn.Module:
    return model._module  # noqa: SLF001 - where nnsight keeps it


def untraced(subject: Subject) -> Any:
    module = module_of(subject.wrapped)
    with torch.no_grad():
        return module(**subject.inputs, use_cache=False) if subject.language else module(**subject.inputs)


def _save_layer(subject: Subject, index: int) -> torch.Tensor:
    model = subject.wrapped
    with torch.no_grad(), _trace(subject):
        hidden = subject.layers(model)[index].output.save()
    return hidden  # noqa: RET504 - it is bound when the block ends


def save_last(subject: Subject) -> torch.Tensor:
    return _save_layer(subject, subject.depth - 1)


def save_third(subject: Subject) -> torch.Tensor:
    return _save_layer(subject, subject.depth // 3 - 1)


def save_all(subject: Subject) -> list[torch.Tensor]:
    model = subject.wrapped
    with torch.no_grad(), _trace(subject):
        layers = subject.layers(model)
        hidden = [layers[index].output for index in range(subject.depth)].save()
        if subject.language:
            hidden.append(subject.head(model).output)
    return hidden


def operations(subject: Subject) -> list[torch.Tensor]:
    model = subject.wrapped
    with torch.no_grad(), _trace(subject):
        computed = compute(subject.layers(model)[subject.depth // 2].output).save()
        end = subject.head(model).output.save()
    return [computed, end]


def patch(subject: Subject) -> torch.Tensor:
    model, ids = subject.wrapped, subject.inputs["input_ids"]
    with torch.no_grad(), model.trace(use_cache=False) as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(ids):
            source = subject.layers(model)[subject.depth // 2].output[:, -1]
            barrier()
        with tracer.invoke(ids.flip(1)):
            barrier()
            subject.layers(model)[subject.depth // 2].output[:, -1] = source
            logits = subject.head(model).output.save()
    return logits


def generate(subject: Subject) -> list[torch.Tensor]:
    model = subject.wrapped
    with torch.no_grad(), model.generate(subject.inputs["input_ids"], **GENERATION) as tracer:
        hidden = [].save()
        for _ in tracer.iter[:NEW_TOKENS]:
            hidden.append(subject.layers(model)[subject.depth // 2].output)
    return hidden


def gradient(subject: Subject) -> torch.Tensor:
    model = subject.wrapped
    with _trace(subject):
        hidden = subject.layers(model)[subject.depth // 2].output
        hidden.requires_grad_()
        loss = subject.head(model).output.sum()
        with loss.backward():
            found = hidden.grad.save()
    return found


def empty(subject: Subject) -> None:
    with torch.no_grad(), _trace(subject):
        pass
