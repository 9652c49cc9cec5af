"""Whether a graph may run at all: its structure, its operations, its limits. Shapes and memory are checked elsewhere.

A graph comes from other people. What is not on the lists of `operations` is refused by name, and every problem of a graph
is collected, so that one answer shows them all.
"""

from __future__ import annotations

import re
from itertools import islice
from types import EllipsisType
from typing import TYPE_CHECKING

from nnsight_hpc.graph import operations
from nnsight_hpc.graph.blocks import Blocks
from nnsight_hpc.graph.build import FORWARDS, HOLDING, INVOKE, LOOP, SAVE
from nnsight_hpc.graph.effort import spend
from nnsight_hpc.graph.limits import (
    MAX_FORWARDS,
    MAX_INTEGER,
    MAX_INVOKES,
    MAX_LOOPS,
    MAX_NODES,
    MAX_PROBLEMS,
    MAX_SAVES,
)
from nnsight_hpc.graph.nodes import Device, DType, Held, Node, Ref, Seed, TensorRef, leaves
from nnsight_hpc.graph.protocol import POINTS, WHERE, is_plain, protocol_problems
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from nnsight_hpc.graph.nodes import Graph

_TENSOR = re.compile(r"[A-Za-z0-9_.-]{1,200}\Z")
_DEVICE = re.compile(r"(cpu|cuda(:\d{1,3})?)\Z")
_LEAVES = (bool, int, float, complex, str, type(None), EllipsisType, Ref, TensorRef, DType, Device, Seed)
KINDS = frozenset({"trace", "session", "capture"})


def validate(graph: Graph, *, local: bool = False) -> None:
    """Raise `InvalidGraph` with all problems of `graph`, each with its node and the user's line; return when there are none.

    `local` says that the graph runs in the process that recorded it, and may use its Python objects and functions.
    """
    problems = list(_within_limits(graph)) or list(islice(_problems(graph, local=local), MAX_PROBLEMS + 1))
    if problems:
        more = ["and more"] if len(problems) > MAX_PROBLEMS else []
        first, _, line = problems[0].partition("\n")
        rest = [*problems[1:MAX_PROBLEMS], *more]
        raise InvalidGraph(f"the graph is refused: {first}", where=line, why="\n".join(rest))


def _within_limits(graph: Graph) -> Iterator[str]:
    forwards = sum(node.op in FORWARDS for node in graph.nodes)
    loops = sum(node.op == LOOP for node in graph.nodes)
    for count, limit, what in (
        (len(graph.nodes), MAX_NODES, "nodes"),
        (forwards, MAX_FORWARDS, "forward passes"),
        (loops, MAX_LOOPS, "loops"),
        (sum(node.op == INVOKE for node in graph.nodes), MAX_INVOKES, "invokes"),
        (len(graph.saves), MAX_SAVES, "saved values"),
    ):
        if count > limit:
            yield f"it has {count} {what}; the limit is {limit}"


def _problems(graph: Graph, *, local: bool) -> Iterator[str]:
    if graph.kind not in KINDS:
        yield f"its kind {graph.kind!r} is not one of {', '.join(sorted(KINDS))}"
    blocks = Blocks()
    for index, node in enumerate(graph.nodes):
        spend(10)
        problems = list(islice(_node_problems(node, index, blocks, local=local), MAX_PROBLEMS + 1))
        for problem in problems:
            yield f"node {node.id} ({repr(node.op[:80])[1:-1]}) {problem}" + (f"\n{node.source}" if node.source else "")
        blocks.add(Node(index, "refused", block=node.block) if problems else node)
    yield from blocks.unfinished()
    for name, target in graph.saves.items():
        if not 0 <= target < len(graph.nodes) or graph.nodes[target].op != SAVE:
            yield f"{name!r} names node {target}, which is no save"


def _node_problems(node: Node, index: int, blocks: Blocks, *, local: bool) -> Iterator[str]:
    if node.id != index:
        yield f"has the id {node.id} at position {index}; ids are positions"
        return
    if not (local and node.op in operations.LOCAL_ONLY) and (reason := operations.why_refused(node.op)):
        yield reason
        return
    for leaf in leaves((node.args, {key: value for key, value in node.kwargs.items() if key != "generator"})):
        spend(1)
        if not (isinstance(leaf, Held) and local and node.op in HOLDING):
            yield from _leaf_problems(leaf, index)
        if isinstance(leaf, Seed):
            yield "has a seed that is not its generator"
    if isinstance(generator := node.kwargs.get("generator"), Seed) and not 0 <= generator.number <= MAX_INTEGER:
        yield f"has the seed {generator.number}; seeds are integers from 0 on"
    yield from (f"has a keyword {key!r} that is no plain name" for key in node.kwargs if not is_plain(key))
    if not all(0 <= ref < index for ref in node.refs()):
        return
    if any(blocks.op(ref) in WHERE for ref in _used(node)):
        yield "uses a forward pass as a value; only points of the model refer to one"
    if node.op not in operations.PROTOCOL:
        yield from _writes_elsewhere(node)
    malformed = list(protocol_problems(node, blocks))
    yield from malformed or blocks.problems(node)


def _used(node: Node) -> Iterable[int]:
    """The nodes whose values `node` uses; the forward that a point belongs to is none of them."""
    refs = list(node.refs())
    return refs[1:] if node.op in POINTS else refs


def _writes_elsewhere(node: Node) -> Iterator[str]:
    """Arguments by which an operation would write into anything but its result, or the value that it is known to change."""
    if reason := operations.random_without_seed(node.op, node.kwargs):
        yield reason
    denied = operations.DENIED_KEYWORDS
    yield from (f"has a keyword {key!r} that is not allowed" for key in node.kwargs if key in denied)
    most = operations.MOST_POSITIONAL.get(node.op, len(node.args))
    if len(node.args) > most:
        yield f"has {len(node.args)} positional arguments; only {most} are allowed: the next may write in place"
    if node.op in operations.IN_PLACE and not (node.args and isinstance(node.args[0], Ref)):
        yield "changes a constant in place; only values of nodes can be changed"


def _leaf_problems(leaf: object, index: int) -> Iterator[str]:
    if isinstance(leaf, Ref) and not 0 <= leaf.id < index:
        yield f"uses the value of node {leaf.id}, which does not come before it"
    elif isinstance(leaf, TensorRef) and not _TENSOR.match(leaf.name):
        yield f"refers to a tensor by the name {leaf.name[:80]!r}"
    elif isinstance(leaf, DType) and leaf.name not in operations.DTYPES:
        yield f"has the unknown dtype {leaf.name[:80]!r}"
    elif isinstance(leaf, Device) and not _DEVICE.match(leaf.name):
        yield f"has the unknown device {leaf.name[:80]!r}"
    elif isinstance(leaf, Held):
        yield "has a Python object as an argument; only forwards and tracer.apply take one, in the process that recorded them"
    elif not isinstance(leaf, _LEAVES):
        yield f"has an argument of type {type(leaf).__name__}, which a graph cannot hold"
