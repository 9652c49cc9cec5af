"""How a model would lie on nodes of GPUs, on paper: bytes a rank, what the ranks send one another, and the time of it.

``placement.py CONFIG`` compares the degrees that fit; ``placement.py CONFIG --tp N`` shows one degree, part by part. CONFIG
is a folder with a ``config.json``, or a name in ``benchmarks/configs``. Nothing is loaded and no GPU is needed: transformers
shards the model on the meta device, as it does when a replica loads it. Times are lower bounds: the rates of the links and
of an H100, the latencies of NCCL's cost model, no Python. Tables are Markdown; ``docs/architecture/scale.md`` explains them.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from nnsight_hpc.parallel.degree import check_degree
from nnsight_hpc.parallel.plans import rules_for
from nnsight_hpc.parallel.upstream import DistributedConfig, replace_layer_number_by_wildcard
from nnsight_hpc.wire.errors import HpcError, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig

CONFIGS = Path(__file__).parent / "configs"
_SUMS = ("all_reduce", "moe_tp_experts")
Rows: TypeAlias = "Iterator[list[str]]"


@dataclass(frozen=True)
class Cluster:
    """What a model would lie on, in bytes and bytes a second; the speed of a GPU is that of an H100 (SXM).

    Attributes
    ----------
    nvlink
        What a GPU sends to others of its node.
    nic
        What one of a node's `nics` network cards sends.
    reserve
        Memory of a GPU for neither model nor requests: CUDA's context, buffers of NCCL and of matrix products.
    hbm, operations
        What a GPU reads from its memory, and half of the bfloat16 operations that its data sheet promises.
    """

    gpus: int
    gpus_per_node: int
    memory: float
    nvlink: float
    nics: int
    nic: float
    reserve: float = 3e9
    hbm: float = 3.35e12
    operations: float = 0.5 * 989e12

    def nodes(self, tp: int) -> int:
        return -(-tp // self.gpus_per_node)

    def rate(self, tp: int) -> float:
        """What leaves a rank on one node, or a node among several."""
        return self.nvlink if self.nodes(tp) == 1 else min(self.nvlink, self.nics * self.nic)

    def all_reduce(self, size: float, tp: int) -> float:
        """Seconds, by a ring or a tree, whichever is faster. Latencies: NCCL 2.20, src/graph/tuning.cc, protocol LL."""
        if tp == 1:
            return 0.0
        nodes, steps = self.nodes(tp), 2 * (tp - 1)
        between = 2 * nodes if nodes > 1 else 0
        ring = 6.6 + (steps - between) * (1.0 if between else 0.6) + between * 2.7
        tree = 6.8 + 2 * ((min(tp, self.gpus_per_node) - 1) * 0.6 + (nodes - 1).bit_length() * 5.0)
        volume = size / self.rate(tp)
        return min(1e-6 * ring + steps / tp * volume, 1e-6 * tree + 2 * volume)

    def all_gather(self, size: float, tp: int) -> float:
        """Seconds until all ranks have `size` bytes, by a ring; latencies as above."""
        between = self.nodes(tp) - 1
        inside = (tp - 1 - between) * (1.0 if between else 0.6)
        return 1e-6 * (6.6 + inside + between * 2.7) + (tp - 1) / tp * size / self.rate(tp) if tp > 1 else 0.0


@dataclass(frozen=True)
class Part:
    """All modules of one name, whatever their layer: shape of a weight, bytes of all of them, and bytes of rank 0."""

    name: str
    shape: str
    times: int
    whole: int
    rank: int


@dataclass(frozen=True)
class Shards:
    """A model at one degree: its parts, how many all-reduces a forward makes, the width of the widest sharded input."""

    parts: tuple[Part, ...]
    all_reduces: int
    site: int

    @property
    def whole(self) -> int:
        return sum(part.whole for part in self.parts)

    @property
    def rank(self) -> int:
        return sum(part.rank for part in self.parts)


def read(config: str) -> PretrainedConfig:
    file = CONFIGS / f"{config}.json"
    found = AutoConfig.from_pretrained(file if file.exists() else config)
    found.dtype = found.dtype or torch.float32
    return found


@cache
def shard(name: str, tp: int) -> Shards:
    """Shard the model on the meta device, as rank 0 of a process group that sends nothing; raises `InvalidInput`."""
    config = read(name)
    check_degree(config, tp)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    whole, modules = dict(model.named_parameters()), dict(model.named_modules())
    dist.init_process_group("fake", rank=0, world_size=tp, store=FakeStore())
    try:
        rules = rules_for(model, tp) if tp > 1 else {}
        resolved = model._resolve_parallel_plans(DistributedConfig(tp_size=tp, tp_plan=rules))[0]  # noqa: SLF001 - as it loads
        plan = {path: style for path, style in resolved.items() if path in modules or path in whole}  # not what is tied
        apply_tensor_parallelism(model, init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",)), plan)
        model.tie_weights()
    finally:
        dist.destroy_process_group()
    own = {path: getattr(weight, "_local_tensor", weight) for path, weight in model.named_parameters()}
    summed = [path for path, style in plan.items() if path in modules and ("rowwise" in style or style in _SUMS)]
    weights = (f"{path}.weight" for path in summed if not plan[path].startswith("embedding"))
    widths = (max(_split_sizes(whole[path], own[path]), default=0) for path in weights if path in whole)
    return Shards(tuple(_parts(whole, own)), len(summed), max(widths, default=0))


def fitting(name: str, most: int) -> Iterator[tuple[int, Shards]]:
    """The degrees that fit."""
    heads = read(name).num_attention_heads
    for tp in range(1, most + 1):
        with suppress(InvalidInput):
            if heads % tp == 0:  # the whole check takes longer
                yield tp, shard(name, tp)


def _split_sizes(whole: torch.Tensor, own: torch.Tensor) -> Iterator[int]:
    return (size for size, part in zip(whole.shape, own.shape, strict=True) if size != part)


def _parts(whole: dict[str, torch.Tensor], own: dict[str, torch.Tensor]) -> Iterator[Part]:
    names = {path: replace_layer_number_by_wildcard(path) for path in whole}
    for name in dict.fromkeys(names.values()):
        paths = [path for path in whole if names[path] == name]
        shape = " x ".join(map(str, whole[paths[0]].shape))
        sizes = (sum(tensors[path].nbytes for path in paths) for tensors in (whole, own))
        yield Part(name, shape, len(paths), *sizes)


def kv_bytes(config: PretrainedConfig, tp: int) -> tuple[str, int]:
    """Bytes a token of keys and values on one rank, and how they come about: whole heads, one at least."""
    heads = max(1, (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) // tp)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factors = 2, config.num_hidden_layers, heads, width, config.dtype.itemsize
    return " x ".join(map(str, factors)), prod(factors)


def compare(name: str, cluster: Cluster, tokens: int) -> Rows:
    """One row a degree: what a rank holds, and the least time of a token that is generated and of a prompt."""
    yield [
        "ranks",
        "replicas",
        "weights a rank",
        "left",
        "tokens that fit",
        "1 token: weights",
        "1 token: all-reduces",
        f"{tokens} tokens: compute",
        f"{tokens} tokens: all-reduces",
        "a gather",
        "tokens/s",
    ]
    config = read(name)
    for tp, shards in fitting(name, cluster.gpus):
        left = cluster.memory - cluster.reserve - shards.rank
        row = [str(tp), str(cluster.gpus // tp), _gigabytes(shards.rank)]
        if left > 0:
            fit = f"{left / kv_bytes(config, tp)[1]:,.0f}"
            yield [*row, _gigabytes(left), fit, *_times(config, shards, tp, cluster, tokens)]
        else:
            yield [*row, "does not fit", *[""] * 7]


def _times(config: PretrainedConfig, shards: Shards, tp: int, cluster: Cluster, tokens: int) -> list[str]:
    item = config.dtype.itemsize
    one, many = (shards.all_reduces * cluster.all_reduce(n * config.hidden_size * item, tp) for n in (1, tokens))
    weights, compute = shards.rank / cluster.hbm, 2 * shards.whole / item * tokens / (tp * cluster.operations)
    gather = cluster.all_gather(tokens * shards.site * item, tp)
    return [*map(_milliseconds, (weights, one, compute, many, gather)), f"{cluster.gpus // tp / (weights + one):.0f}"]


def parts(name: str, tp: int) -> Rows:
    """The weights of one degree, module by module."""
    shards = shard(name, tp)
    yield ["parameter", "shape", "times", "bytes in all", "bytes a rank"]
    for part in shards.parts:
        yield [f"`{part.name}`", part.shape, str(part.times), f"{part.whole:,}", f"{part.rank:,}"]
    yield ["sum", "", "", f"{shards.whole:,}", f"{shards.rank:,}"]


def traffic(name: str, tp: int, cluster: Cluster) -> Rows:
    """What one token adds to a rank's memory, and what it makes the ranks send, step by step."""
    config, shards, nodes = read(name), shard(name, tp), cluster.nodes(tp)
    item, n = config.dtype.itemsize, shards.all_reduces
    row, kv = config.hidden_size * item, kv_bytes(config, tp)
    yield ["for each token", "how", "bytes"]
    yield ["keys and values on a rank", kv[0], f"{kv[1]:,}"]
    yield ["keys and values on all ranks", f"{tp} x {kv[1]}", f"{tp * kv[1]:,}"]
    yield ["one all-reduce", f"{config.hidden_size} x {item}", f"{row:,}"]
    yield [f"{n} all-reduces", f"{n} x {row}", f"{n * row:,}"]
    yield ["sent by a rank, one ring", f"2 x {tp - 1}/{tp} of that", f"{2 * (tp - 1) * n * row // tp:,}"]
    if nodes > 1:
        yield ["leaves a node, one ring", "the same", f"{2 * (tp - 1) * n * row // tp:,}"]
        yield [
            "leaves a node, summed inside first",
            f"2 x {nodes - 1}/{nodes}",
            f"{2 * (nodes - 1) * n * row // nodes:,}",
        ]
    yield ["logits, gathered", f"{config.vocab_size} x {item}", f"{config.vocab_size * item:,}"]
    yield ["the widest sharded input, gathered", f"{shards.site} x {item}", f"{shards.site * item:,}"]


def markdown(rows: Rows) -> str:
    head, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.{2 if seconds < 0.01 else 1 if seconds < 0.1 else 0}f} ms"


def main(words: list[str] | None = None) -> str:
    """The tables that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--tp", type=int, metavar="N", help="show this degree, part by part")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="length of a prompt (2048)")
    parser.add_argument("--gpus", type=int, default=16, metavar="N", help="in all (16)")
    parser.add_argument("--gpus-per-node", type=int, default=4, metavar="N", help="(4)")
    parser.add_argument("--memory", type=float, default=80, metavar="GB", help="of a GPU (80)")
    parser.add_argument("--nvlink", type=float, default=450, metavar="GB/S", help="of a GPU, one way (450)")
    parser.add_argument("--nics", type=int, default=4, metavar="N", help="network cards a node (4)")
    parser.add_argument("--nic", type=float, default=400, metavar="GBIT/S", help="of a network card (400)")
    given = parser.parse_args(words)
    cluster = Cluster(
        given.gpus, given.gpus_per_node, given.memory * 1e9, given.nvlink * 1e9, given.nics, given.nic * 1e9 / 8
    )
    if given.tp is None:
        return markdown(compare(given.config, cluster, given.tokens))
    return markdown(parts(given.config, given.tp)) + "\n" + markdown(traffic(given.config, given.tp, cluster))


if __name__ == "__main__":
    try:
        print(main(), end="")
    except HpcError as error:
        sys.exit(str(error))
