"""What is asked of a model while faults are thrown at it: programs of each kind, and some that cannot work."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nnsight_hpc import LanguageModel
from nnsight_hpc.execution import run_graph
from nnsight_hpc.slurm.worker.model import Program
from nnsight_hpc.wire.errors import HpcError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nnsight_hpc.graph import Graph

TOO_LARGE = 2**27
"""Elements of the tensor that `too_large` makes."""

FOR_EACH = 2**14
"""Elements that `data_sized` makes for each one of a hidden state."""


class Traced(NamedTuple):
    """A program, and the error that it ends with in one process."""

    program: Program
    error: HpcError | None


class Traces(LanguageModel):
    """A model that keeps the programs which are traced on it, and runs them in this process."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self._traces: list[Traced] = []

    def _backend(self, **_where: Any) -> Backend:
        return Backend(self._traces)


class Backend:
    remote = False

    def __init__(self, traces: list[Traced]) -> None:
        self._traces = traces

    def run(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: Traces, **_local: Any) -> dict[str, Any]:
        program = Program(graph, tensors)
        try:
            values = run_graph(graph, tensors, model._module)
        except HpcError as error:
            self._traces.append(Traced(program, error))
            raise
        self._traces.append(Traced(program, None))
        return values


def traced(module: torch.nn.Module, trace: Callable[[Any, torch.Tensor], None]) -> Traced:
    """What a function traces on a model."""
    model = Traces(module)
    with suppress(HpcError):
        trace(model, torch.randint(3, 500, (2, 6), generator=torch.Generator().manual_seed(3)))
    return model._traces[-1]


def read(model, ids) -> None:
    """Sharded inputs and outputs, and some arithmetic."""
    with model.trace(ids):
        layer = model.model.layers[1]
        layer.mlp.gate_proj.output.save()
        (layer.self_attn.q_proj.output * 2).mean(-1).save()
        layer.mlp.down_proj.input.save()
        model.lm_head.output.save()


def edit(model, ids) -> None:
    """A sharded value is changed, in place and by another one."""
    with model.trace(ids):
        model.model.layers[0].mlp.act_fn.output[..., ::3] = 0
        model.model.layers[1].self_attn.o_proj.input = model.model.layers[1].self_attn.o_proj.input * 3
        model.lm_head.output.save()


def gradient(model, ids) -> None:
    """Gradients at a sharded value, read and changed during the backward pass."""
    with model.trace(ids):
        first, second = model.model.layers[0].mlp.up_proj.output, model.model.layers[1].mlp.up_proj.output
        loss = model.lm_head.output.logsumexp(-1).sum()
        with loss.backward():
            (second.grad * 2).save()
            second.grad = second.grad * 3 + 1
            first.grad.save()


def generation(model, ids) -> None:
    """Four steps, each of them read and changed."""
    with model.generate(ids, max_new_tokens=4, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            model.model.layers[1].mlp.act_fn.output[..., ::2] = 0
            model.model.layers[1].mlp.down_proj.input.save()
        tracer.result.save()


def source(model, ids) -> None:
    """An operation inside of the attention, where heads are."""
    with model.trace(ids):
        attention = model.model.layers[1].self_attn.source.attention_interface_0
        attention.output[0][:, 1] = 0
        attention.output[0].save()
        model.lm_head.output.save()


def invokes(model, ids) -> None:
    """Two prompts that share a forward, one of them changed."""
    with model.trace() as tracer:
        with tracer.invoke(ids):
            model.model.layers[0].mlp.act_fn.output[..., ::3] = 0
            model.model.layers[1].mlp.gate_proj.output.save()
        with tracer.invoke(ids.flip(0)):
            model.model.layers[1].mlp.gate_proj.output.save()


PROGRAMS = (read, edit, gradient, generation, source, invokes)


def too_large(model, ids) -> None:
    """A tensor that not every rank has memory for."""
    with model.trace(ids):
        room = model.model.layers[0].mlp.act_fn.output.sum().expand(TOO_LARGE).clone()
        room[:3].save()


def data_sized(model, ids) -> None:
    """A tensor whose size only the run can tell."""
    with model.trace(ids):
        hidden = model.model.layers[0].output
        torch.repeat_interleave(hidden.flatten()[:1], (hidden > float("-inf")).sum() * FOR_EACH)[:3].save()


def wrong_shape(model, ids) -> None:
    """Two values that do not fit, at a sharded place."""
    with model.trace(ids):
        (model.model.layers[0].mlp.act_fn.output + model.model.layers[0].output).save()


def wrong_change(model, ids) -> None:
    """A value that the model cannot go on with."""
    with model.trace(ids):
        model.model.layers[0].mlp.act_fn.output = model.model.layers[0].mlp.act_fn.output[..., :-1]
        model.lm_head.output.save()


def changed_weight(model, ids) -> None:
    """A parameter is written into."""
    with model.trace(ids):
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
        model.lm_head.output.save()
