"""The checks on fake tensors: a worker's check of a graph before the run, and recording with `validate`.

The first check of a program runs its nodes, and once for each shape the model, on fake tensors; the second one of the same
structure and shapes looks the result up. CPU time, medians; each against what it stands beside in the same run.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
from figures import Figure, main
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_hpc.execution.estimate import check_memory
from nnsight_hpc.execution.fake import Shadow
from nnsight_hpc.graph import Graph, GraphBuilder, Ref, TensorRef
from nnsight_hpc.wire.messages import ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYERS, OPERATIONS = 12, 30


def _model(width: int) -> nn.Module:
    config = GPT2Config(n_layer=LAYERS, n_embd=width, n_head=8, vocab_size=1024, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval().requires_grad_(requires_grad=False)


def _inputs(tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(tokens)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": ids}


def _program(constant: float) -> Graph:
    """All layers saved, and operations on one of them."""
    builder = GraphBuilder()
    inputs = {name: TensorRef(name) for name in ("input_ids", "attention_mask", "position_ids")}
    forward = Ref(builder.append("model.forward", (), {**inputs, "use_cache": False}, None))
    values = [Ref(builder.add("model.output", forward, f"transformer.h.{layer}")) for layer in range(LAYERS)]
    saves = {f"layer{n}": builder.add("save", value) for n, value in enumerate(values)}
    last = values[-1]
    for _ in range(OPERATIONS):
        last = Ref(builder.add("operator.add", last, constant))
    saves["last"] = builder.add("save", last)
    return builder.build(saves, ModelIdentity(id="gpt2"))


def _median(function: Callable[[int], object], times: int) -> float:
    """Milliseconds of CPU time that a call takes; it is given its number."""
    taken = []
    for number in range(times):
        begun = time.process_time()
        function(number)
        taken.append(time.process_time() - begun)
    return 1e3 * statistics.median(taken)


def _record(graph: Graph, tensors: dict[str, torch.Tensor], model: nn.Module) -> None:
    shadow = Shadow(model)
    for node in graph.nodes:
        shadow.node(node, tensors)


def measure(quick: bool) -> Iterator[Figure]:
    torch.set_num_threads(1)
    times, (model, tensors) = 5 if quick else 25, (_model(768), _inputs(64))
    check_memory(_program(0.5), tensors, model)  # the first fake tensor of a process imports a lot
    programs = [_program(1.0 + number) for number in range(times)]
    shape = _median(lambda number: check_memory(_program(0.5), _inputs(65 + number), model), times)
    first = _median(lambda number: check_memory(programs[number], tensors, model), times)
    second = _median(lambda number: check_memory(programs[number], tensors, model), times)
    recorded = _median(lambda _: _record(programs[0], tensors, model), times)
    with torch.no_grad():
        forward = _median(lambda _: model(**tensors, use_cache=False), times)
    nodes = len(programs[0].nodes)
    yield Figure("forward of GPT-2 (12 layers, 768, 64 tokens), ms", forward, None, "<=", "")
    yield Figure("first check of a shape of inputs, ms", shape, None, "<=", "the model runs on fake tensors")
    yield Figure(f"first check of a program of {nodes} nodes, ms", first, None, "<=", "the shape is known")
    yield Figure("second check, ms", second, None, "<=", "")
    yield Figure("second check / first", second / first, 0.1, "<=", "the first check of the program")
    yield Figure("second check / forward", second / forward, 0.02, "<=", "the forward")
    yield Figure("first check of a program / forward", first / forward, 0.5, "<=", "the forward")
    yield Figure("validate, ms a node", recorded / nodes, 0.5, "<=", "")


if __name__ == "__main__":
    main(measure, __doc__)
