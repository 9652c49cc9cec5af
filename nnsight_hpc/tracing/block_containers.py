"""Python's lists and dicts that the worker fills, and those that are to be kept as they are when a block ends."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import APPEND, DICT, LIST, SAVE
from nnsight_hpc.graph.nodes import Ref, refs_in
from nnsight_hpc.tracing.block_merge import names_in, recordable, values_in
from nnsight_hpc.tracing.block_objects import Objects
from nnsight_hpc.tracing.block_templates import is_ours
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from nnsight_hpc.graph.nodes import Node
    from nnsight_hpc.tracing.recorder import Recorder
    from nnsight_hpc.tracing.value import Value

_FILLS = frozenset({APPEND, "operator.setitem"})


class Containers:
    """The containers of one block."""

    def __init__(self) -> None:
        self._kept: list[Any] = []
        self._moved: list[tuple[Value, Any]] = []
        self.objects = Objects()

    def keep(self, item: Any) -> Any:
        """``[…].save()``: its values are saved when the block ends."""
        if type(item) not in (list, dict, tuple):
            return item.save()
        self._kept.append(item)
        return item

    def of_worker(self, name: str, frame: FrameType, recorder: Recorder) -> Any:
        """A container where the graph runs, with the entries of one of Python's; other objects themselves."""
        held = names_in(frame, (name,))[name]
        if type(held) not in (list, dict, set):
            return held
        code = frame.f_code
        used = {*code.co_names, *code.co_varnames, *code.co_cellvars}
        other = [n for n, item in names_in(frame, sorted(used - {name})).items() if item is held and not is_ours(n)]
        if other:
            raise InvalidInput(
                f"the {type(held).__name__} {name!r}, which is also {other[0]!r}, is changed where a value decides",
                where=str(users_line()),
                why="it becomes a container where the graph runs, which only one name can stand for",
                next=f"use one name in the block, or a copy: {name} = {name}.copy()",
            )
        if type(held) is set or not all(map(recordable, held.values() if isinstance(held, dict) else held)):
            raise InvalidInput(
                f"a {type(held).__name__} is changed where a value decides, and it cannot be recorded",
                where=str(users_line()),
                why="a graph has lists and dicts of values, numbers, strings, and lists of them",
                next="change another list there",
            )
        if isinstance(held, list):
            made = recorder.record(LIST, *held)
        else:
            made = recorder.record(DICT)
            for key, entry in held.items():
                made[key] = entry
        self._moved.append((made, held))
        return made

    def added(self, old: Any, new: Any) -> Any:
        """``old += new``."""
        if type(new) in (list, tuple) and any(made is old for made, _ in self._moved):
            old.extend(new)
            return old
        old += new
        return old

    def note(self, made: Value) -> None:
        """A list where the graph runs that stands for no list of Python's."""
        self._moved.append((made, None))

    def finish(self) -> None:
        """At the end of the block: save what is to be kept, and have Python's containers filled with the results."""
        moved = {id(held) for _, held in self._moved if held is not None}
        for item in self._kept:
            for value in values_in(item) if id(item) not in moved else ():
                if value.saved is None:
                    value.save()
        kept = {id(item) for item in self._kept}
        for made, held in self._moved:
            self._save(made, held, asked_for=id(held) in kept)
            if held is not None and made.saved is not None:
                made.recorder.bound.append(functools.partial(_fill, held, made.recorder, made.saved))

    def _save(self, made: Value, held: Any, *, asked_for: bool) -> None:
        """Save a container if it was asked for, if one of its entries is saved, or if one needs no save: a plain number."""
        recorder = made.recorder
        nodes = recorder.builder.nodes
        fills = [node for node in nodes[made.node :] if node.op in _FILLS and node.args[0] == Ref(made.node)]
        entries = {
            ref for entry in (*nodes[made.node].args, *(node.args[-1] for node in fills)) for ref in refs_in(entry)
        }
        saves = [node for node in nodes if node.op == SAVE and node.args[0].id in entries]
        in_loop = recorder.in_loop(nodes[made.node])
        if made.saved is not None or (in_loop and not asked_for):  # a name has what such a list was in the last pass
            return
        if _is_list_of(saves, fills, held) and recorder.in_loop(saves[0]) and not in_loop:
            made.saved = saves[0].id
        elif asked_for or saves or (held is not None and any(not [*refs_in(node.args[-1])] for node in fills)):
            _fill_with_saves(nodes, made.node, fills, saves)
            made.saved = recorder.save(made)


def _is_list_of(saves: list[Node], fills: list[Node], held: Any) -> bool:
    """Whether the results of one save, as those of all passes of a loop, are the container's entries."""
    once = len(saves) == 1 == len(fills) and fills[0].op == APPEND and fills[0].args[1] == saves[0].args[0]
    return once and not held and type(held) is not dict and saves[0].block == fills[0].block


def _fill_with_saves(nodes: list[Node], made: int, fills: list[Node], saves: list[Node]) -> None:
    """Fill a container with its entries as they were where they were saved, if nothing else in the block looks at it."""
    filling = {node.id for node in fills}
    if any(made in refs_in((node.args, node.kwargs)) for node in nodes[made:] if node.id not in filling):
        return
    for node in (nodes[made], *fills):
        around = [None, *_blocks(nodes, node)]
        kept = {save.args[0]: Ref(save.id) for save in saves if save.id < node.id and save.block in around}
        args = tuple([kept.get(arg, arg) if type(arg) is Ref else arg for arg in node.args])
        nodes[node.id] = dataclasses.replace(node, args=args)


def _blocks(nodes: list[Node], node: Node) -> Iterator[int]:
    """The blocks that a node stands in."""
    block = node.block
    while block is not None:
        yield block
        block = nodes[block].block


def _fill(held: Any, recorder: Recorder, saved: int) -> None:
    result = recorder.results.get(saved)
    if isinstance(held, list) and isinstance(result, list):
        held[:] = result
    elif isinstance(held, dict) and isinstance(result, dict):
        held.update(result)
