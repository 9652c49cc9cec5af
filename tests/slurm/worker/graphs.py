"""Request frames that tests send."""

from __future__ import annotations

import functools
import json

import torch

from nnsight_hpc.execution.values import save_tensors
from nnsight_hpc.graph import Ref, TensorRef
from nnsight_hpc.graph.build import FORWARD, GENERATE, LOG, READS, RESULT, SAVE, GraphBuilder
from nnsight_hpc.graph.nodes import Source
from nnsight_hpc.wire.frames import pack
from nnsight_hpc.wire.messages import DumpSpec, ModelIdentity, encode

IDS = torch.tensor([[3, 4, 5, 6, 7]])
MINUTES = 60_000
"""Tokens to draw, or documents to dump: that takes minutes, and whoever waits for its middle does not miss it."""


def capture_frame(point: str = "model.layers.1", *, forwards: int = 1) -> bytes:
    """Save the output of a module, the same in each of `forwards` forwards, as ``hidden``; all of them are needed."""
    builder = GraphBuilder()
    values = []
    for _ in range(forwards):
        forward = builder.append(FORWARD, (), {"input_ids": TensorRef("ids"), "use_cache": False}, None)
        values.append(builder.add(READS["output"], Ref(forward), point))
    value = functools.reduce(lambda a, b: builder.add("torch.maximum", Ref(a), Ref(b)), values)
    save = builder.add(SAVE, Ref(value))
    return _frame(builder, {"hidden": save}, {"ids": IDS})


def talking_frame(forwards: int = 1, *, line: str = "of layer 1") -> bytes:
    """Say something after each of `forwards` forwards."""
    builder = GraphBuilder()
    for number in range(forwards):
        forward = builder.append(FORWARD, (), {"input_ids": TensorRef("ids"), "use_cache": False}, None)
        value = builder.add(READS["output"], Ref(forward), "model.layers.1")
        mean = Ref(builder.add("Tensor.mean", Ref(value)))
        builder.append(LOG, (f"mean {number}", line, mean), {}, Source("x.py", 3, "log(…)"))
    return _frame(builder, {}, {"ids": IDS})


def endless_frame() -> bytes:
    """Say something after the first forward of a generation that takes minutes, whatever it draws."""
    builder = GraphBuilder()
    drawing = {"input_ids": TensorRef("ids"), "min_new_tokens": MINUTES, "max_new_tokens": MINUTES}
    generation = builder.append(GENERATE, (), drawing, None)
    value = builder.add(READS["output"], Ref(generation), "model.layers.1")
    builder.append(LOG, ("begun", Ref(builder.add("Tensor.mean", Ref(value)))), {}, Source("x.py", 3, "log(…)"))
    result = builder.add(RESULT, Ref(generation))
    return _frame(builder, {"tokens": builder.add(SAVE, Ref(result))}, {"ids": IDS})


def sampled_frame(tokens: int, seed: int) -> bytes:
    """Save ``tokens``: the prompt, and so many that are drawn."""
    builder = GraphBuilder()
    drawing = {"input_ids": TensorRef("ids"), "max_new_tokens": tokens, "do_sample": True, "seed": seed}
    result = builder.add(RESULT, Ref(builder.append(GENERATE, (), drawing, None)))
    return _frame(builder, {"tokens": builder.add(SAVE, Ref(result))}, {"ids": IDS})


def operation_frame(op: str, *args: object) -> bytes:
    """Save the result of one operation without the model."""
    builder = GraphBuilder()
    save = builder.add(SAVE, Ref(builder.add(op, *args)))
    return _frame(builder, {"value": save}, {})


def dump_frame(documents: list[str], captures: tuple[str, ...], name: str = "set", **options: object) -> bytes:
    lines = "\n".join(json.dumps({"id": f"doc-{n}", "text": text}) for n, text in enumerate(documents))
    return pack(encode(DumpSpec(name=name, captures=captures, **options)), lines.encode())


def _frame(builder: GraphBuilder, saves: dict[str, int], tensors: dict[str, torch.Tensor]) -> bytes:
    graph = builder.build(saves, ModelIdentity(id="tiny"))
    return pack(graph.to_json().encode(), save_tensors(tensors))


WRONG = [
    (lambda: operation_frame("torch.load", "/etc/passwd"), "InvalidGraph", "torch.load"),
    (lambda: capture_frame("model.layers.9"), "InvalidGraph", "model.layers.9"),
    (lambda: operation_frame("torch.zeros", [1 << 50]), "InvalidGraph", "memory"),
    (lambda: operation_frame("operator.truediv", 1, 0), "ExecutionFailed", "division by zero"),
    (lambda: capture_frame()[:-30], "InvalidInput", "safetensors"),
]
"""Requests that cannot be run, of which kind their errors are, and what these say."""
