"""What every node of a graph will give, without its data: shapes, dtypes and devices, known while the block is recorded.

Nodes are evaluated one by one in program order on fake tensors, which have no memory. What depends on data (`nonzero`,
`item`, a choice of experts) is `UNKNOWN`, and so is what is computed from it. An operation that cannot work on such shapes
raises at the user's line what it would raise in a run.

A conditional on something known runs its branch only; on something unknown both. Of a loop the first pass is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from nnsight_hpc.execution.control import MOST_PASSES
from nnsight_hpc.execution.failures import explained
from nnsight_hpc.execution.fake_evaluate import evaluate
from nnsight_hpc.execution.fake_limits import check_container
from nnsight_hpc.execution.fake_model import Call, twin_of
from nnsight_hpc.execution.fake_points import Part, Passage
from nnsight_hpc.execution.fake_tensors import UNKNOWABLE, UNKNOWN, Unknown, alike, is_unknown
from nnsight_hpc.execution.locate import find_module, find_parameter
from nnsight_hpc.execution.resolve import constant
from nnsight_hpc.graph import build
from nnsight_hpc.graph.nodes import Held, Ref, TensorRef, map_leaves

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nnsight_hpc.execution.fake_model import Twin
    from nnsight_hpc.graph.nodes import Node

__all__ = ["UNKNOWN", "Shadow", "Unknown"]

_COLLECTED = 1 << 12
_Special = Callable[["Shadow", "Node", tuple[Any, ...], dict[str, Any]], Any]
_POINTS = build.KIND_OF | {build.SKIP: "skip"}


class Shadow:
    """The fake values of the nodes of one graph, as it is recorded or as a whole.

    Parameters
    ----------
    module
        The model, real or on the meta device. It is not run and not changed; its form is copied once (`fake_model`).
    strict
        Whether what the model itself raises on fakes is an error. Otherwise its points are unknown, and a run will tell.
    values
        Whether the values of constants of one element count, which may be sizes, and not the form of constants alone.

    Attributes
    ----------
    why
        Why points of the model are unknown, if they are: the first reason met.
    varying
        Items and variables of loops that may have another form at a later pass than at the first.
    """

    def __init__(self, module: torch.nn.Module, *, strict: bool = True, values: bool = False) -> None:
        self.twin: Twin = twin_of(module)
        self._strict, self._known = strict, values
        self.why = ""
        self._values: dict[int, Any] = {}
        self._constants: dict[str, torch.Tensor] = {}
        self._nodes: dict[int, Node] = {}
        self._dead: set[int] = set()
        self._lengths: dict[int, int | None] = {}
        self._next: dict[int, Any] = {}
        self.varying: set[int] = set()

    def node(self, node: Node, tensors: Mapping[str, torch.Tensor]) -> Any:
        """The fake value of `node`; those of all earlier nodes that it uses have to be asked for before.

        Parameters
        ----------
        tensors
            The tensor constants of the graph so far, by name.

        Raises
        ------
        ExecutionFailed
            The operation cannot work on these shapes; it is also of the type that the operation raises in a run.
        InvalidGraph
            The model has no such module or parameter.
        """
        if node.id not in self._values:
            self._nodes[node.id] = node
            self._values[node.id] = self._evaluated(node, tensors)
        return self._values[node.id]

    def value(self, node: int | None) -> Any:
        """The value of an earlier node that is not dropped yet; `UNKNOWN` of any other."""
        return UNKNOWN if node is None else self._values.get(node, UNKNOWN)

    def given(self, argument: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
        """The fake value of an argument of a node: of an earlier node or a constant."""
        return map_leaves(argument, lambda leaf: self._leaf(leaf, tensors))

    def forget(self, node: int) -> None:
        """Drop the value of a node that nothing uses any more."""
        self._values.pop(node, None)

    def passage(self, node: int) -> Passage | None:
        """The forward or generation with that number; None for one in a branch that is not taken."""
        return self._values[node] or None

    def iterations(self, loop: int) -> int | None:
        """How many passes a loop has; None where that is not known."""
        return self._lengths.get(loop)

    def _evaluated(self, node: Node, tensors: Mapping[str, torch.Tensor]) -> Any:
        if node.block in self._dead and node.op != build.ELSE:
            self._dead.add(node.id)
            return UNKNOWN
        args, kwargs = self.given((node.args, dict(node.kwargs)), tensors)
        special = self._special.get(node.op)
        shown = args[1:] if args and isinstance(args[0], Passage | Part) else args
        try:
            if special is None:
                return evaluate(self.twin, node.op, args, kwargs)
            return self._on_the_model(special, node, args, kwargs)
        except Exception as error:  # noqa: BLE001 - whatever a user's operation raises is theirs to see
            raise explained(node, shown, kwargs, error) from None

    def _on_the_model(self, special: _Special, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return special(self, node, args, kwargs)
        except UNKNOWABLE:
            return UNKNOWN

    def _leaf(self, leaf: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
        if isinstance(leaf, Ref):
            return self._values[leaf.id]
        if isinstance(leaf, TensorRef):
            if leaf.name not in self._constants:
                fake = self.twin.fake_known if self._known else self.twin.fake_like
                self._constants[leaf.name] = fake(tensors[leaf.name], self.twin.device)
            return self._constants[leaf.name]
        return UNKNOWN if isinstance(leaf, Held) else constant(leaf, self.twin.device)

    # What the protocol's own operations give

    def _forward(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Passage:
        generate = node.op == build.GENERATE
        if generate:
            kwargs.pop("seed", None)
        passage = Passage(self.twin, Call(args, kwargs, generate), strict=self._strict)
        self.why = self.why or passage.why
        return passage

    def _invoke(self, _node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Part:
        return Part(*args)

    def _point(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        where, path, *new = args
        part = where if isinstance(where, Part) else None
        passage: Passage = where.passage if isinstance(where, Part) else where
        place = (path, _POINTS[node.op], kwargs.get("call", 0))
        if not self.twin.why:
            find_module(self.twin.module, path.partition(":")[0], node)
        with self.twin.active():
            if not new:
                return passage.read(*place, part)
            passage.set(*place, part, new[0])
        self.why = self.why or passage.why
        return None

    def _result(self, _node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        where = args[0]
        with self.twin.active():
            return where.passage.result(where) if isinstance(where, Part) else where.result(None)

    def _parameter(self, node: Node, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        if self.twin.why:
            return UNKNOWN
        with self.twin.active():
            return find_parameter(self.twin.module, node)

    def _call(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.twin.why or is_unknown((args, kwargs)):
            return UNKNOWN
        module = find_module(self.twin.module, args[0], node)
        with self.twin.active():
            return module(*args[1:], **kwargs)

    def _first(self, _node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        return args[0]

    def _nothing(self, _node: Node, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        return None

    def _unknown(self, _node: Node, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Unknown:
        return UNKNOWN

    def _backward(self, _node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        loss, gradient, *_ = *args, kwargs.get("gradient")
        if isinstance(loss, torch.Tensor) and gradient is None and loss.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")

    def _gradient(self, _node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        if not isinstance(args[0], torch.Tensor):
            return UNKNOWN
        with self.twin.active():
            return torch.empty_like(args[0])

    # Conditionals and loops

    def _if(self, node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        known = not isinstance(args[0], torch.Tensor) and not is_unknown(args[0])
        if known and not args[0]:
            self._dead.add(node.id)
        return bool(args[0]) if known else UNKNOWN

    def _else(self, node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if args[0] is True or node.block in self._dead:
            self._dead.add(node.id)

    def _merge(self, _node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        condition, one, other = args
        if condition is UNKNOWN:
            return one if not is_unknown((one, other)) and alike(one, other) else UNKNOWN
        return one if condition else other

    def _loop(self, node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        length = self._lengths[node.id] = _length(args[0])
        if length == 0:
            self._dead.add(node.id)
        if length is not None and length > MOST_PASSES:
            raise ValueError(f"a loop of {length} passes; the limit is {MOST_PASSES}")
        return args[0]

    def _item(self, node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        over = args[0]
        if isinstance(over, torch.Tensor):
            with self.twin.active():
                return over[0]
        self.varying.add(node.id)
        return next(iter(over)) if isinstance(over, list | tuple | range | dict) else UNKNOWN

    def _carried(self, _node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        return args[1]

    def _follow(self, node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        carried = node.args[0].id
        self._next[carried] = args[1]
        if not isinstance(args[1], torch.Tensor) or not alike(*args):
            self.varying.add(carried)
        return args[1]

    def _end(self, node: Node, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> int:
        return int(node.args[0].id)

    def _final(self, node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        """A tensor, where no variable of the loop changes its form; a number is another at the last pass."""
        loop, value = args
        if not isinstance(value, torch.Tensor) or self._varies(loop):
            return UNKNOWN
        return self._next.get(node.args[1].id, value)

    def _collect(self, _node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        loop, value = args
        passes = self.iterations(loop)
        if passes is None or passes > _COLLECTED or not isinstance(value, torch.Tensor) or self._varies(loop):
            return UNKNOWN
        return [value] * passes

    def _varies(self, loop: int) -> bool:
        """Whether a later pass may have other shapes than the first."""
        return any(self._nodes[varying].args[0].id == loop for varying in self.varying)

    # Containers

    def _list(self, _node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> list[Any]:
        check_container(args)
        return list(args)

    def _dict(self, _node: Node, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        check_container(kwargs)
        return dict(kwargs)

    def _append(self, node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        """In another block than the list was made in, it is not known how often this happens."""
        made = node.args[0].id
        if args[0] is UNKNOWN or self._nodes[made].block != node.block:
            self._values[made] = UNKNOWN
            return UNKNOWN
        args[0].append(args[1])
        check_container(args[0])
        return args[0]

    def _count(self, _node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        return UNKNOWN if args[0] is UNKNOWN else len(args[0])

    def _range(self, _node: Node, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        return UNKNOWN if is_unknown(args) or any(isinstance(a, torch.Tensor) for a in args) else range(*args)

    _special: ClassVar[dict[str, _Special]] = {
        **dict.fromkeys(build.FORWARDS, _forward),
        build.INVOKE: _invoke,
        **dict.fromkeys(_POINTS, _point),
        build.RESULT: _result,
        build.PARAMETER: _parameter,
        build.CALL: _call,
        build.SAVE: _first,
        build.LOG: _nothing,
        build.APPLY: _unknown,
        build.BACKWARD: _backward,
        build.READ_GRAD: _gradient,
        build.SET_GRAD: _nothing,
        build.IF: _if,
        build.ELSE: _else,
        build.MERGE: _merge,
        build.LOOP: _loop,
        build.ITEM: _item,
        build.CARRIED: _carried,
        build.NEXT: _follow,
        build.END: _end,
        build.FINAL: _final,
        build.COLLECT: _collect,
        build.RANGE: _range,
        build.LEAVE: _unknown,
        build.CHECK: _nothing,
        build.REACHED: _unknown,
        build.LIST: _list,
        build.DICT: _dict,
        build.APPEND: _append,
        build.LENGTH: _count,
    }


def _length(value: Any) -> int | None:
    """How many items a value has to iterate over; None where that is not known."""
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.ndim else None
    return len(value) if isinstance(value, list | tuple | range | dict) else None
