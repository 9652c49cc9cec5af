"""Validated schedules by the structure of their graphs, so that a loop over prompts pays once."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING, Any

from nnsight_hpc.execution.schedule import Schedule, compile_graph
from nnsight_hpc.graph.effort import effort
from nnsight_hpc.graph.nodes import Graph, Ref
from nnsight_hpc.graph.validation import validate

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from nnsight_hpc.graph.nodes import Node

_MOST = 256
_LARGE = 5_000
"""Of graphs with more nodes only the last is remembered: their schedules take megabytes."""
_schedules: OrderedDict[Hashable, Schedule] = OrderedDict()
_recent: dict[int, tuple[tuple[Node, ...], tuple[bool, str, Mapping[str, int]], Schedule]] = {}
"""Those that were asked for last, by the identity of their nodes, which are held so that it stays their own."""
_lock = Lock()


def scheduled(graph: Graph, *, local: bool) -> Schedule:
    """The schedule of `graph`, compiled or from an earlier graph of the same structure.

    Parameters
    ----------
    local
        Whether the graph may use Python objects and functions of this process.

    Raises
    ------
    InvalidGraph
        The graph is refused.
    """
    known = _recent.get(id(graph.nodes))
    if known is not None and known[0] is graph.nodes and known[1] == (local, graph.kind, graph.saves):
        return known[2]
    large = len(graph.nodes) > _LARGE
    schedule = _compiled(graph, local=local) if large else _by_structure(graph, local=local)
    if large or len(_recent) >= _MOST:
        _recent.clear()
    _recent[id(graph.nodes)] = (graph.nodes, (local, graph.kind, graph.saves), schedule)
    return schedule


def _by_structure(graph: Graph, *, local: bool) -> Schedule:
    key = (local, graph.kind, tuple(graph.saves.items()), structure(graph))
    with _lock:
        if key in _schedules:
            _schedules.move_to_end(key)
            return _schedules[key]
    schedule = _compiled(graph, local=local)
    with _lock:
        _schedules[key] = schedule
        if len(_schedules) > _MOST:
            _schedules.popitem(last=False)
    return schedule


def _compiled(graph: Graph, *, local: bool) -> Schedule:
    with effort():
        validate(graph, local=local)
        return compile_graph(graph)


def structure(graph: Graph) -> Hashable:
    """Equal for two graphs that differ in the tensors of their constants only; ``1``, ``1.0`` and ``True`` differ."""
    return tuple((n.id, n.op, n.block, n.source, _frozen(n.args), _frozen(n.kwargs)) for n in graph.nodes)


def _frozen(value: Any) -> Hashable:
    kind = type(value)
    if kind is Ref:
        return (Ref, value.id)
    if kind is tuple or kind is list:
        return (kind, *[_frozen(item) for item in value])
    if kind is dict:
        return tuple((key, _frozen(item)) for key, item in value.items())
    if kind is slice:
        return (slice, _frozen(value.start), _frozen(value.stop), _frozen(value.step))
    return (kind, repr(value)) if kind is float or kind is complex else (kind, value)
