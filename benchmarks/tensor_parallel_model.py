"""One rank of the part of `tensor_parallel.py` that runs a model: ``… tensor_parallel_model.py ANSWER FOLDER TOKENS SECONDS``.

Rank 0 writes to ANSWER the seconds of the fastest call of each way, and how many words a forward takes. The ways take turns.
While one process runs the whole model, the other ranks sleep.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.fake_model import stand_in
from nnsight_hpc.execution.together import Task, run_together
from nnsight_hpc.graph import Graph, GraphBuilder, Ref, TensorRef
from nnsight_hpc.models import load, module_tree
from nnsight_hpc.parallel import Guard, World, form_group, join
from nnsight_hpc.parallel.loading import load_parallel
from nnsight_hpc.parallel.view import ShardedView
from nnsight_hpc.wire.messages import ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SITE = "mlp.down_proj"
"""Its input is split; the output of the block around it is whole."""
TIMES = 20
REQUESTS, WORDS = 8, 12
"""That share a forward, or run one by one; with so many tokens each."""
_NAP = 0.001


def fastest(
    world: World, seconds: float, alone: Callable[[], Any], together: Mapping[str, Callable[[], Any]]
) -> dict[str, float]:
    """Seconds of the fastest call of `alone`, on rank 0, and of each way that all ranks go together."""
    best, end = dict.fromkeys(["alone", *together], float("inf")), time.monotonic() + seconds

    def timed(name: str, way: Callable[[], Any]) -> None:
        begun = time.perf_counter()
        way()
        best[name] = min(best[name], time.perf_counter() - begun)

    while world.comm.bcast(time.monotonic() < end):
        if world.rank == 0:
            timed("alone", alone)
        arrived = world.comm.Ibarrier()
        while not arrived.Test():
            time.sleep(_NAP)  # a rank that spins would take rank 0's core
        for name, way in together.items():
            world.comm.Barrier()
            timed(name, way)
    return best


def program(layers: int, read: str, path: str) -> Graph:
    """A mean of what is read at one path of every block."""
    builder = GraphBuilder()
    forward = Ref(builder.append("model.forward", (), {"input_ids": TensorRef("ids"), "use_cache": False}, None))
    points = [Ref(builder.add(read, forward, f"model.layers.{layer}{path}")) for layer in range(layers)]
    means = [Ref(builder.add("Tensor.mean", point)) for point in points]
    return builder.build({f"mean{n}": builder.add("save", mean) for n, mean in enumerate(means)}, ModelIdentity(id=""))


def gathers(view: ShardedView, local: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """The value of one site put together, everywhere and on rank 0 alone, and a bare all-gather of as many bytes."""
    path, tree = f"model.layers.0.{SITE}", ((local,), {})
    gathered = local.new_empty(dist.get_world_size() * local.shape[0], *local.shape[1:])
    return {
        "everywhere": lambda: view.whole(path, "input", tree),
        "root": lambda: view.whole(path, "input", tree, root_only=True),
        "bare": lambda: dist.group.WORLD.all_gather_single(gathered, local).wait(),
    }


def requests(graphs: Mapping[str, Graph], part: torch.nn.Module, view: ShardedView) -> dict[str, Callable[[], Any]]:
    """Each graph on several prompts, one by one and in one forward; and the bare model, without the head: no graph needs it."""
    prompts = [torch.arange(n, n + WORDS)[None] for n in range(REQUESTS)]

    def bare(*calls: torch.Tensor) -> None:
        for ids in calls:
            part.model(input_ids=ids, use_cache=False)

    def one_by_one(tasks: Sequence[Task]) -> None:
        for task in tasks:
            run_graph(task.graph, task.tensors, part, view=view)

    ways = {"bare, one by one": partial(bare, *prompts), "bare, shared": partial(bare, torch.cat(prompts))}
    for name, graph in graphs.items():
        tasks = [Task(graph, {"ids": ids}, None, lambda _line, _source: None, None) for ids in prompts]
        ways[f"{name}, one by one"] = partial(one_by_one, tasks)
        ways[f"{name}, shared"] = partial(run_together, tasks, part, view=view)
    return ways


def main(answer: str, folder: str, tokens: str, seconds: str) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.disable_progress_bar()
    whole = load(folder).module  # before there is a process group; rank 0 alone runs it
    world = join(print)
    guard = Guard(world)
    form_group(world, guard)
    part = load_parallel(folder, world, guard).module
    tree = module_tree(folder)
    stand_in(part, tree)
    view = guard.run(lambda: ShardedView(world, part, tree))
    ids = torch.arange(3, 3 + int(tokens))[None]
    inputs = {"input_ids": ids, "use_cache": False}

    def repeated(way: Callable[[], Any]) -> None:
        for _ in range(TIMES):
            way()

    layers, width = len(part.model.layers), part.config.intermediate_size // world.size
    local = torch.zeros(1, ids.shape[1], width)
    graphs = {"whole": program(layers, "model.output", ""), "split": program(layers, "model.input", f".{SITE}")}
    guarded = {
        "guarded": lambda: part(**inputs),
        **{name: partial(run_graph, graph, {"ids": ids}, part, view=view) for name, graph in graphs.items()},
        **{name: partial(repeated, way) for name, way in gathers(view, local).items()},
        **requests(graphs, part, view),
    }
    together = {"unguarded": lambda: part(**inputs)}
    together |= {name: partial(guard.run, way) for name, way in guarded.items()}
    for way in together.values():
        way()
    before = guard.progress.words
    together["guarded"]()
    words = guard.progress.words - before
    counts = {
        "words": words,
        "layers": layers,
        "times": TIMES,
        "bytes": local.nbytes * world.size,
        "requests": REQUESTS,
    }
    best = fastest(world, float(seconds), lambda: whole(**inputs), together)
    if world.rank == 0:
        Path(answer).write_text(json.dumps(best | counts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
