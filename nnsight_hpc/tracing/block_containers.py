"""Python's lists and dicts that the worker fills, and those that are to be kept as they are when a block ends."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import APPEND, DICT, END, ITEM, LENGTH, LIST, LOOP, SAVE
from nnsight_hpc.graph.nodes import Ref, refs_in
from nnsight_hpc.tracing.block_merge import names_in, recordable, values_in
from nnsight_hpc.tracing.block_objects import Objects
from nnsight_hpc.tracing.block_reach import Reach
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from nnsight_hpc.graph.nodes import Node
    from nnsight_hpc.tracing.recorder import Recorder

_FILLS = frozenset({APPEND, "operator.setitem"})


class Containers:
    """The containers of one block, which belongs to a frame of the researcher's."""

    def __init__(self, frame: FrameType) -> None:
        self._frame = frame
        self._kept: list[Any] = []
        self._moved: list[tuple[Value, Any, str]] = []
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
        tensor = type(held) is not Value and hasattr(held, "untyped_storage")
        if type(held) not in (list, dict, set) and not tensor:
            return held
        other = Reach(frame, without=name).paths.get(id(held))
        if other is None and tensor:
            other = next((n for n, item in self._frame.f_locals.items() if item is held and n != name), None)
        if other is not None:
            copy = "clone" if tensor else "copy"
            raise InvalidInput(
                f"the {type(held).__name__} {name!r}, which is also {other!r}, is changed where a value decides",
                where=str(users_line()),
                why="it becomes another one where the graph runs, which only one name can stand for",
                next=f"use one name in the block, or a copy: {name} = {name}.{copy}()",
            )
        if tensor:
            return held
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
        self._moved.append((made, held, name))
        return made

    def added(self, old: Any, new: Any) -> Any:
        """``old += new``."""
        if type(new) in (list, tuple) and any(made is old for made, *_ in self._moved):
            old.extend(new)
            return old
        old += new
        return old

    def note(self, made: Value) -> None:
        """A list where the graph runs that stands for no list of Python's."""
        self._moved.append((made, None, ""))

    def finish(self) -> None:
        """At the end of the block: save what is to be kept, and have Python's containers filled with the results."""
        moved = {id(held) for _, held, _ in self._moved if held is not None}
        for item in self._kept:
            for value in values_in(item) if id(item) not in moved else ():
                if value.saved is None:
                    value.save()
        kept = {id(item) for item in self._kept}
        for made, held, name in self._moved:
            fills = [
                n for n in made.recorder.builder.nodes[made.node :] if n.op in _FILLS and n.args[0] == Ref(made.node)
            ]
            self._save(made, held, fills, asked_for=id(held) in kept)
            if held is not None and made.saved is not None:
                made.recorder.bound.append(functools.partial(_fill, held, made.recorder, made.saved))
            elif held is not None and fills and not made.recorder.in_loop(made.recorder.builder.nodes[made.node]):
                _note_unsaved(made, held, name, fills)

    def _save(self, made: Value, held: Any, fills: list[Node], *, asked_for: bool) -> None:
        """Save a container if it was asked for, if one of its entries is saved, or if one needs no save: a plain number."""
        recorder = made.recorder
        nodes = recorder.builder.nodes
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


def _note_unsaved(made: Value, held: Any, name: str, fills: list[Node]) -> None:
    """Have one of Python's containers get as many entries as the worker's, or its keys: values that were not saved."""
    recorder = made.recorder
    if type(held) is list:
        save = recorder.save(recorder.record(LENGTH, made))
    else:
        loop = recorder.record(LOOP, made)
        with recorder.inside(loop):
            save = recorder.save(recorder.record(ITEM, loop))
        recorder.record(END, loop)
    recorder.names[save] = f"len({name})" if type(held) is list else f"keys of {name}"
    entry = Value(recorder, fills[0].args[-1].id)
    appended = all(node.op == APPEND for node in fills)
    recorder.bound.append(functools.partial(_fill_with, held, recorder, save, entry, appended=appended))


def _fill_with(held: Any, recorder: Recorder, save: int, entry: Value, *, appended: bool) -> None:
    found = recorder.results.get(save)
    if isinstance(found, int):
        held[:] = [*held, *[entry] * (found - len(held))] if appended else [entry] * found
    elif isinstance(found, list):
        held.update(dict.fromkeys(found, entry))


def _fill(held: Any, recorder: Recorder, saved: int) -> None:
    result = recorder.results.get(saved)
    if isinstance(held, list) and isinstance(result, list):
        held[:] = result
    elif isinstance(held, dict) and isinstance(result, dict):
        held.update(result)
