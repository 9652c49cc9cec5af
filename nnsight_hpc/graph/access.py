"""What of the model a graph reads and sets, by the paths of its modules.

Every operation of the protocol has its decision here; a graph with one that has none is refused. Of all other operations
those matter that change a value in place: a value that was read from the model lies in the model's own memory.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from nnsight_hpc.graph import build
from nnsight_hpc.graph.build import CALL, GENERATE, KIND_OF, PARAMETER, READ_GRAD, READS, RESULT, SET_GRAD, SETS, SKIP
from nnsight_hpc.graph.effort import spend
from nnsight_hpc.graph.nodes import refs_in
from nnsight_hpc.graph.operations import IN_PLACE, PROTOCOL
from nnsight_hpc.graph.points import places_of
from nnsight_hpc.graph.sharing import Memory, changes_container
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nnsight_hpc.graph.nodes import Graph, Node
    from nnsight_hpc.graph.points import Places

Right = Literal["read", "set", "parameters"]
"""What an access needs: to read or to set a module, or to see weights."""


class Access(NamedTuple):
    """One way in which a node touches the model.

    Attributes
    ----------
    does
        In words, as the end of a sentence that begins with the node (``reads model.layers.3.output``); ``{}`` stands for a
        module where there may be several.
    modules
        The paths of the modules; the empty one is the whole model.
    """

    node: Node
    does: str
    modules: frozenset[str]
    right: Right


def accesses(graph: Graph) -> Iterator[Access]:
    """All accesses of a validated graph, in program order; a node may have several.

    Raises
    ------
    InvalidGraph
        An operation has no decision; a gradient belongs to no backward pass; or the graph is too entangled (`effort`).
    """
    model = _Model(graph)
    for node in graph.nodes:
        if decide := DECISIONS.get(node.op):
            yield from decide(node, model)
        elif node.op in PROTOCOL:
            raise InvalidGraph(f"nobody has decided what {node.op} needs", where=str(node.source or f"node {node.id}"))
        elif node.op in IN_PLACE:
            yield from _change(node, model)


class _Model:
    """Which modules' values share memory with which nodes', read off the graph when that is first asked for."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._known: dict[tuple[int, bool], frozenset[str]] = {}

    def modules(self, node: int, *, alone: bool = False) -> frozenset[str]:
        """The modules whose inputs or outputs, or gradients of these, the value of a node may lie in.

        With `alone` not those of what it holds, should it be a list or dict.
        """
        memory = self._memory
        key = memory(node), alone
        if key not in self._known:
            blocks = {key[0]} if alone else memory.with_held(node)
            self._known[key] = frozenset().union(*(self._in.get(block, ()) for block in blocks))
            spend(len(blocks) + len(self._known[key]))
        return self._known[key]

    @cached_property
    def _places(self) -> Places:
        return places_of(self.graph, range(len(self.graph.nodes)))

    @cached_property
    def _memory(self) -> Memory:
        """That of the whole graph; a gradient counts as its value's, and the values of a loop's passes as one."""
        handed = {node.id: tuple(refs_in(node.args)) for node in self.graph.nodes if node.op in _HANDS_ON}
        return Memory(self.graph, self._places, handed)

    @cached_property
    def _in(self) -> dict[int, set[str]]:
        """The modules whose values lie in a memory."""
        found: dict[int, set[str]] = defaultdict(set)
        for node, point in self._places.points.items():
            if point.kind not in ("grad", "result"):
                found[self._memory(node)].add(_module_of(point.module))
        return found


def _module_of(place: str) -> str:
    """The module of a path that may go on to operations inside of its forward."""
    return place.partition(":")[0]


def _point(node: Node) -> str:
    """A point as the user writes it."""
    return f"{node.args[1]}.{KIND_OF[node.op]}".lstrip(".")


def _read(node: Node, _model: _Model) -> Iterator[Access]:
    place = node.args[1]
    yield Access(node, f"reads {_point(node)}", frozenset({_module_of(place)}), "read")
    if ":" in place:  # an operation's arguments may be the weights, its result made of them alone
        yield Access(node, f"reads inside a forward, at {_point(node)}, where weights are seen", _WHOLE, "parameters")


def _set(node: Node, _model: _Model) -> Iterator[Access]:
    does = f"skips {node.args[1] or 'the model'}" if node.op == SKIP else f"sets {_point(node)}"
    yield Access(node, does, frozenset({_module_of(node.args[1])}), "set")


def _result(node: Node, model: _Model) -> Iterator[Access]:
    """The tokens of a generation are the model's answer, which whoever may send a request gets; all else is read."""
    forward = model.graph.nodes[node.args[0].id]
    if forward.op == build.INVOKE:
        forward = model.graph.nodes[forward.args[0].id]
    if forward.op != GENERATE or forward.kwargs.get("return_dict_in_generate") not in (None, False):
        yield Access(node, "reads the model's result", _WHOLE, "read")


def _parameter(node: Node, _model: _Model) -> Iterator[Access]:
    path = ".".join(part for part in node.args if part)
    yield Access(node, f"reads the parameter {path}", _WHOLE, "parameters")
    yield Access(node, f"reads the parameter {path}", frozenset({path.rpartition(".")[0]}), "read")


def _call(node: Node, _model: _Model) -> Iterator[Access]:
    """To run a module on a value of one's own is to set its input and to read its output."""
    module = frozenset({node.args[0]})
    yield Access(node, "calls {} on a value, and so reads its output", module, "read")
    yield Access(node, "calls {} on a value, and so sets its input", module, "set")


def _read_gradient(node: Node, model: _Model) -> Iterator[Access]:
    yield Access(node, "reads the gradient of a value of {}", model.modules(node.args[0].id), "read")


def _set_gradient(node: Node, model: _Model) -> Iterator[Access]:
    yield Access(node, "sets the gradient of a value of {}", model.modules(node.args[0].id), "set")


def _change(node: Node, model: _Model) -> Iterator[Access]:
    if node.op != "Tensor.requires_grad_":  # it writes no element
        changed = model.modules(node.args[0].id, alone=changes_container(node, model.graph))
        yield Access(node, "changes a value of {} in place, and so sets it", changed, "set")


def _nothing(_node: Node, _model: _Model) -> Iterator[Access]:
    """The values that go through such a node were read elsewhere, or are the user's own."""
    return iter(())


_WHOLE = frozenset({""})
_HANDS_ON = frozenset({build.ITEM, build.CARRIED, build.END, build.FINAL, build.COLLECT, READ_GRAD, SET_GRAD})
"""Operations whose value belongs to what they refer to, beside those that `sharing` knows of itself."""
DECISIONS: dict[str, Callable[[Node, _Model], Iterator[Access]]] = {
    **dict.fromkeys(READS.values(), _read),
    **dict.fromkeys((*SETS.values(), SKIP), _set),
    RESULT: _result,
    PARAMETER: _parameter,
    CALL: _call,
    READ_GRAD: _read_gradient,
    SET_GRAD: _set_gradient,
    build.APPEND: _change,
    # What the model is called with is the user's to choose, as is the loss.
    **dict.fromkeys((*build.FORWARDS, build.INVOKE, build.BACKWARD), _nothing),
    **dict.fromkeys((build.IF, build.ELSE, build.MERGE, build.REACHED, build.CHECK), _nothing),
    **dict.fromkeys((build.LOOP, build.CARRIED, build.NEXT, build.LEAVE, build.RANGE, build.ITEM), _nothing),
    **dict.fromkeys((build.END, build.FINAL, build.COLLECT), _nothing),
    **dict.fromkeys((build.LIST, build.DICT, build.LENGTH, "attribute", build.SAVE, build.LOG), _nothing),
}
"""Of each operation of the protocol that may come from a user, its accesses."""
