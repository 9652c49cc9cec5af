"""The cases of `tracing.py` in nnsight-hpc."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from tracing_hooks import GENERATION, compute

from nnsight_hpc import LanguageModel, NNsight

if TYPE_CHECKING:
    from torch import nn
    from tracing_models import Subject

VERSION = version("nnsight-hpc")


def wrap(module: nn.Module, tokenizer: Any) -> Any:
    return NNsight(module) if tokenizer is None else LanguageModel(module, tokenizer=tokenizer)


def _trace(subject: Subject) -> Any:
    return subject.wrapped.trace(*[value for key, value in subject.inputs.items() if key != "attention_mask"])


def module_of(model: Any) -> nn.Module:
    return model.module


def untraced(subject: Subject) -> Any:
    module = module_of(subject.wrapped)
    with torch.no_grad():
        return module(**subject.inputs, use_cache=False) if subject.language else module(**subject.inputs)


def _save_layer(subject: Subject, index: int) -> torch.Tensor:
    model = subject.wrapped
    with _trace(subject):
        hidden = subject.layers(model)[index].output.save()
    return hidden  # noqa: RET504 - it is bound when the block ends


def save_last(subject: Subject) -> torch.Tensor:
    return _save_layer(subject, subject.depth - 1)


def save_third(subject: Subject) -> torch.Tensor:
    return _save_layer(subject, subject.depth // 3 - 1)


def save_all(subject: Subject) -> list[torch.Tensor]:
    model = subject.wrapped
    with _trace(subject):
        layers = subject.layers(model)
        hidden = [layers[index].output.save() for index in range(subject.depth)]
        if subject.language:
            hidden.append(subject.head(model).output.save())
    return hidden


def operations(subject: Subject) -> list[torch.Tensor]:
    model = subject.wrapped
    with _trace(subject):
        computed = compute(subject.layers(model)[subject.depth // 2].output).save()
        end = subject.head(model).output.save()
    return [computed, end]


def patch(subject: Subject) -> torch.Tensor:
    model, ids = subject.wrapped, subject.inputs["input_ids"]
    with model.trace() as tracer:
        with tracer.invoke(ids):
            source = subject.layers(model)[subject.depth // 2].output[:, -1]
        with tracer.invoke(ids.flip(1)):
            subject.layers(model)[subject.depth // 2].output[:, -1] = source
            logits = subject.head(model).output.save()
    return logits


def generate(subject: Subject) -> list[torch.Tensor]:
    model = subject.wrapped
    with model.generate(subject.inputs["input_ids"], **GENERATION) as tracer:
        hidden = tracer.list().save()
        for _ in tracer.iter[:]:
            hidden.append(subject.layers(model)[subject.depth // 2].output)
    return hidden


def gradient(subject: Subject) -> torch.Tensor:
    model = subject.wrapped
    with _trace(subject):
        hidden = subject.layers(model)[subject.depth // 2].output
        loss = subject.head(model).output.sum()
        with loss.backward():
            found = hidden.grad.save()
    return found


def empty(subject: Subject) -> None:
    with _trace(subject):
        pass
