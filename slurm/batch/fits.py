"""Whether a pool's job could ever run on the cluster's nodes, and what is allowed where it could not."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.slurm.batch.nodes import counted
from nnsight_hpc.slurm.batch.options import memory_bytes, time_limit
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nnsight_hpc.slurm.batch.nodes import Nodes
    from nnsight_hpc.wire.pools import PoolSpec


class _Need(NamedTuple):
    """Something that a node must have: in words, whether nodes have it, and what they have in its place."""

    words: str
    met: Callable[[Nodes], bool]
    offer: Callable[[Nodes], str]


def check_fits(spec: PoolSpec, nodes: Sequence[Nodes]) -> None:
    """Raise `InvalidInput` when no partition that the pool names has nodes for its job; without `nodes`, never.

    Only what is certain is refused: nodes that are down or taken count as well.
    """
    if not nodes:
        return
    names = _partitions(spec, nodes)
    _check_features(spec, nodes)
    lacks = [_lack(spec, name, nodes) for name in names]
    if all(lacks):
        others = sorted({n.partition for n in nodes} - set(names))
        able = [name for name in others if not _lack(spec, name, nodes)]
        raise InvalidInput(
            f"the job of pool {spec.name} could never start",
            why="; ".join(filter(None, lacks)),
            next=f"ask for what there is, or use partition {' or '.join(able)}" if able else "ask for what there is",
        )


def _partitions(spec: PoolSpec, nodes: Sequence[Nodes]) -> list[str]:
    """Those that the job may run in: the pool's, the user's own default (``SBATCH_PARTITION``), or Slurm's."""
    known = sorted({n.partition for n in nodes})
    named = spec.partition or os.environ.get("SBATCH_PARTITION")
    names = named.split(",") if named else sorted({n.partition for n in nodes if n.default})
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InvalidInput(
            f"there is no partition {unknown[0]}" if unknown else "this cluster has no default partition",
            where=f"pool {spec.name}",
            next=f"use one of {', '.join(known)}",
        )
    return names


def _check_features(spec: PoolSpec, nodes: Sequence[Nodes]) -> None:
    known = frozenset().union(*(n.features for n in nodes))
    wanted = re.sub(r"\*\d+", "", spec.constraint or "")  # a number of nodes that have it
    unknown = [word for word in re.split(r"[&|,()\[\]\s]+", wanted) if word and word not in known]
    if unknown:
        raise InvalidInput(
            f"no node has the feature {unknown[0]}",
            where=f"pool {spec.name}, constraint {spec.constraint}",
            next=f"use of {', '.join(sorted(known))}" if known else "leave the constraint out: no node has features",
        )


def _lack(spec: PoolSpec, partition: str, nodes: Sequence[Nodes]) -> str:
    """The first need of a job that a partition cannot meet on enough nodes, with what it has; empty: it meets all."""
    having = [n for n in nodes if n.partition == partition]
    for need in _needs(spec):
        met = [n for n in having if need.met(n)]
        if sum(n.count for n in met) < spec.nodes:
            return f"the pool asks for {need.words}, partition {partition} has {_offered(need, having)}"
        having = met
    return ""


def _offered(need: _Need, having: Sequence[Nodes]) -> str:
    """What there is of it, and on how many nodes, where nodes differ in it."""
    numbers: dict[str, int] = {}
    for nodes in having:
        numbers[need.offer(nodes)] = numbers.get(need.offer(nodes), 0) + nodes.count
    if len(numbers) == 1:
        return next(iter(numbers)) or _nodes(sum(numbers.values()))
    return " or ".join(f"{offer} ({_nodes(number)})" for offer, number in numbers.items())


def _needs(spec: PoolSpec) -> Iterator[_Need]:
    limit, cpus = time_limit(spec.time), spec.ranks_per_node * (spec.cpus_per_task or 1)
    yield _Need(_nodes(spec.nodes), lambda _: True, lambda _: "")
    if spec.qos is None:  # a QOS may lift these limits of partitions
        yield _Need(f"a time of {spec.time}", lambda n: limit <= (n.seconds or limit), lambda n: f"at most {n.time}")
        yield _Need(
            _nodes(spec.nodes), lambda n: spec.nodes <= (n.most or spec.nodes), lambda n: f"at most {n.most} a job"
        )
    for kind, number in _wanted_gres(spec):
        yield _Need(_each(f"{number} {kind}", spec), _has(kind, number), _gres_in_words)
    yield _Need(_each(f"{cpus} CPUs", spec), lambda n: cpus <= (n.cpus or cpus), lambda n: f"{n.cpus}")
    if spec.mem is not None:
        memory = memory_bytes(spec.mem)
        words = _each(f"{spec.mem} of memory", spec)
        yield _Need(words, lambda n: memory <= (n.memory or memory), lambda n: f"{(n.memory or 0) >> 20}M")


def _wanted_gres(spec: PoolSpec) -> Iterator[tuple[str, int]]:
    """Kinds of GRES, and how many of each a node must have: of ``gpu:a100:2,nvme`` two, and one."""
    if spec.gpus_per_node:
        yield "gpu", spec.gpus_per_node
    yield from (counted(item.removeprefix("gres:")) for item in (spec.gres or "").split(",") if item)


def _has(kind: str, number: int) -> Callable[[Nodes], bool]:
    return lambda n: n.has(kind) >= number


def _gres_in_words(nodes: Nodes) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in nodes.gres.items()) or "none"


def _nodes(number: int) -> str:
    return f"{number} node{'s' * (number > 1)}"


def _each(words: str, spec: PoolSpec) -> str:
    return f"{words} on {'each of ' * (spec.nodes > 1)}{_nodes(spec.nodes)}"
