"""Whether a graph may run at all: its structure, its operations, its limits. Shapes and memory are checked elsewhere.

A graph comes from other people. What is not on the lists of `operations` is refused by name, and every problem of a graph
is collected, so that one answer shows them all.
"""

from __future__ import annotations

import keyword
import re
from typing import TYPE_CHECKING

from nnsight_hpc.graph import operations
from nnsight_hpc.graph.build import CALL, FORWARD, PARAMETER, READS, SAVE, SETS
from nnsight_hpc.graph.limits import MAX_FORWARDS, MAX_NODES, MAX_PROBLEMS, MAX_SAVES
from nnsight_hpc.graph.nodes import Device, DType, Ref, TensorRef, leaves
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from nnsight_hpc.graph.nodes import Graph, Node

_MODULE = re.compile(r"([A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*)?\Z")
_TENSOR = re.compile(r"[A-Za-z0-9_.-]{1,200}\Z")
_DEVICE = re.compile(r"(cpu|cuda(:\d{1,3})?)\Z")
KINDS = frozenset({"trace", "session", "capture"})


def validate(graph: Graph) -> None:
    """Raise `InvalidGraph` with all problems of `graph`, each with its node and the user's line; return when there are none."""
    problems = list(_within_limits(graph)) or list(_problems(graph))
    if problems:
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        first = problems[0].split("\n")[0]
        rest = [*problems[1:MAX_PROBLEMS], *more]
        raise InvalidGraph(f"the graph is refused: {first}", why="\n".join([*problems[0].split("\n")[1:], *rest]))


def _within_limits(graph: Graph) -> Iterator[str]:
    forwards = sum(node.op == FORWARD for node in graph.nodes)
    for count, limit, what in (
        (len(graph.nodes), MAX_NODES, "nodes"),
        (forwards, MAX_FORWARDS, "forward passes"),
        (len(graph.saves), MAX_SAVES, "saved values"),
    ):
        if count > limit:
            yield f"it has {count} {what}; the limit is {limit}"


def _problems(graph: Graph) -> Iterator[str]:
    if graph.kind not in KINDS:
        yield f"its kind {graph.kind!r} is not one of {', '.join(sorted(KINDS))}"
    ops: dict[int, str] = {}
    for index, node in enumerate(graph.nodes):
        for problem in _node_problems(node, index, ops):
            yield f"node {node.id} ({node.op}) {problem}" + (f"\n{node.source}" if node.source else "")
        ops[index] = node.op
    for name, target in graph.saves.items():
        if ops.get(target) != SAVE:
            yield f"{name!r} names node {target}, which is no save"


def _node_problems(node: Node, index: int, ops: dict[int, str]) -> Iterator[str]:
    if node.id != index:
        yield f"has the id {node.id} at position {index}; ids are positions"
    if reason := operations.why_refused(node.op):
        yield reason
        return
    for leaf in leaves((node.args, dict(node.kwargs))):
        yield from _leaf_problems(leaf, index)
    yield from (f"has a keyword {key!r} that is no plain name" for key in node.kwargs if not _plain(key))
    if any(ops.get(ref) == FORWARD for ref in _used(node)):
        yield "uses a forward pass as a value; only points of the model refer to one"
    if node.op not in operations.PROTOCOL:
        yield from _writes_elsewhere(node)
    if check := _PROTOCOL.get(node.op):
        yield from check(node, ops)


def _used(node: Node) -> Iterable[int]:
    """The nodes whose values `node` uses; the forward that a point belongs to is none of them."""
    refs = list(node.refs())
    return refs[1:] if node.op in _POINTS else refs


def _writes_elsewhere(node: Node) -> Iterator[str]:
    """Arguments by which an operation would write into anything but its result, or the value that it is known to change."""
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


def _plain(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_")


def _at_point(node: Node, ops: dict[int, str]) -> Iterator[str]:
    """``(forward, module path[, value], call=0)``: a read or a set of a module's input or output."""
    values = 3 if node.op in SETS.values() else 2
    if len(node.args) != values or not isinstance(node.args[0], Ref) or not isinstance(node.args[1], str):
        yield "does not have the arguments (forward, module path" + (", value)" if values == 3 else ")")
        return
    if ops.get(node.args[0].id) != FORWARD:
        yield f"belongs to node {node.args[0].id}, which is no forward pass"
    if not _MODULE.match(node.args[1]):
        yield f"has the module path {node.args[1][:80]!r}"
    call = node.kwargs.get("call", 0)
    if set(node.kwargs) - {"call"} or not isinstance(call, int) or isinstance(call, bool) or call < 0:
        yield "takes no keyword but call, an integer from 0 on"


def _parameter(node: Node, _ops: dict[int, str]) -> Iterator[str]:
    ok = len(node.args) == 2 and not node.kwargs and all(isinstance(a, str) and _MODULE.match(a) for a in node.args)
    if not ok:
        yield "does not have the arguments (module path, name)"


def _call(node: Node, _ops: dict[int, str]) -> Iterator[str]:
    if not node.args or not isinstance(node.args[0], str) or not _MODULE.match(node.args[0]):
        yield "does not have the arguments (module path, …)"


def _save(node: Node, _ops: dict[int, str]) -> Iterator[str]:
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], Ref):
        yield "does not have one argument, a node"


def _attribute(node: Node, _ops: dict[int, str]) -> Iterator[str]:
    if len(node.args) != 2 or node.kwargs or not isinstance(node.args[0], Ref) or not isinstance(node.args[1], str):
        yield "does not have the arguments (node, name)"
    elif not _plain(node.args[1]):
        yield f"asks for the attribute {node.args[1][:80]!r}; private names are not allowed"


def _setitem(node: Node, _ops: dict[int, str]) -> Iterator[str]:
    if len(node.args) != 3 or node.kwargs or not isinstance(node.args[0], Ref):
        yield "does not have the arguments (node, index, value)"


_POINTS = frozenset({*READS.values(), *SETS.values()})
_PROTOCOL: dict[str, Callable[[Node, dict[int, str]], Iterator[str]]] = {
    **dict.fromkeys(_POINTS, _at_point),
    PARAMETER: _parameter,
    CALL: _call,
    SAVE: _save,
    "attribute": _attribute,
    "operator.setitem": _setitem,
}
