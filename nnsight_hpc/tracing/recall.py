"""What the same block recorded the last time: a loop over prompts records the same nodes again and again.

A node that is as it was then is used again, and where all are, so is the whole tuple of nodes. What was worked out for it,
the schedule above all, is then found by identity.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.nodes import Device, DType, Node, Ref, Seed, TensorRef
from nnsight_hpc.tracing.value import Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import CodeType, FrameType

    from nnsight_hpc.graph.nodes import Source

_MOST = 256
_LARGE = 5_000
"""Recordings with more nodes are not remembered: they take megabytes."""
_blocks: dict[tuple[int, int], tuple[CodeType, tuple[Node, ...]]] = {}
"""The nodes of a block by its code object, which is held so that its id stays its own, and instruction."""


class Recall:
    """The nodes that the block at `frame` recorded the last time."""

    def __init__(self, frame: FrameType) -> None:
        self._code, self._site = frame.f_code, (id(frame.f_code), frame.f_lasti)
        known = _blocks.get(self._site)
        self.nodes: tuple[Node, ...] = () if known is None else known[1]

    def all(self, nodes: Sequence[Node]) -> tuple[Node, ...]:
        """`nodes` as a tuple: that of the last time, if they are the same; it is remembered for the next."""
        if len(nodes) == len(self.nodes) and all(map(is_, nodes, self.nodes)):
            return self.nodes
        made = tuple(nodes)
        if len(made) <= _LARGE:
            if len(_blocks) >= _MOST:
                _blocks.clear()
            _blocks[self._site] = self._code, made
        return made


def repeated(  # noqa: PLR0917 - those of a node, in its order
    node: Node,
    op: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    source: Source | None,
    block: int | None,
    recorder: object,
) -> bool:
    """Whether a node with this content would be `node`; values among the arguments are those of `recorder`, or references."""
    before = node.args
    count = len(args)
    if node.source is not source or node.op != op or node.block != block or len(before) != count:
        return False
    if count == 2:  # nearly all have two or one, and a loop takes three times as long
        same = _same(args[0], before[0], recorder) and _same(args[1], before[1], recorder)
    elif count == 1:
        same = _same(args[0], before[0], recorder)
    else:
        same = _all_same(args, before, recorder)
    return same and (not (kwargs or node.kwargs) or _same(kwargs, node.kwargs, recorder))


def _same(new: Any, old: Any, recorder: object) -> bool:
    """Whether two arguments are the same to a graph: ``1``, ``1.0`` and ``True`` are not."""
    if new is old:
        return True
    kind = type(new)
    if kind is Value:
        return type(old) is Ref and new.node == old.id and new.recorder is recorder
    if kind is not type(old):
        return False
    if kind is tuple or kind is list:
        return len(new) == len(old) and _all_same(new, old, recorder)
    if kind is slice:
        return _all_same((new.start, new.stop, new.step), (old.start, old.stop, old.step), recorder)
    if kind is dict:
        return [*new] == [*old] and _all_same(new.values(), old.values(), recorder)
    if kind is float or kind is complex:
        return repr(new) == repr(old)
    return kind in _COMPARED and bool(new == old)


def _all_same(new: Iterable[Any], old: Iterable[Any], recorder: object) -> bool:
    """The same for two lists of one length."""
    for a, b in zip(new, old):  # noqa: B905, SIM110 - `strict` takes longer than the rest, a generator too
        if a is not b and not _same(a, b, recorder):
            return False
    return True


_COMPARED = frozenset({type(None), bool, int, str, type(...), Ref, TensorRef, DType, Device, Seed})
"""Of other types (tensors, objects of the researcher's) it is not known whether two are the same."""
