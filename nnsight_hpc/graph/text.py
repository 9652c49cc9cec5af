"""A graph as text that reads like the code it was recorded from: the user's names, module paths, indented blocks.

::

    with model.trace(input_ids=<t0 int64[1, 9]>):                # experiment.py:9
        h = model.layers[3].output.save()                        # experiment.py:10
        model.layers[4].output[:, -1] = h[:, -1] * 2             # experiment.py:11

Names come from the lines of the program and from the names of the saves. A name is used again only where nothing needs
what it stood for before, so that the text means what the graph does.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.graph.build import (
    BACKWARD,
    CARRIED,
    ELSE,
    END,
    FINAL,
    FORWARDS,
    GENERATE,
    INVOKE,
    ITEM,
    LOOP,
    MERGE,
    NEXT,
    PARAMETER,
    READS,
    RESULT,
    SAVE,
    SETS,
)
from nnsight_hpc.graph.expressions import Code, Expressions, path_of
from nnsight_hpc.graph.layout import Place, layout, well_formed
from nnsight_hpc.graph.nodes import Graph, Node, Ref
from nnsight_hpc.graph.operations import IN_PLACE
from nnsight_hpc.graph.statements import OPENERS, STATEMENTS, Statements, loop_target

if TYPE_CHECKING:
    from collections.abc import Iterator

_ATOMS = frozenset({*READS.values(), PARAMETER, RESULT})
"""Written wherever they are used."""
_HIDDEN = frozenset({END, ITEM})
_WIDEST = 72
"""A longer expression gets a name of its own."""
_COMMENTS_AT = 60
_SAVED = re.compile(r"[A-Za-z_]\w*(\[[^\[\]]{1,40}\])*")


def as_text(graph: Graph) -> str:
    title = f"graph of {graph.model.id or 'a module'} ({graph.kind}, {len(graph.nodes)} nodes)"
    lines = Listing(graph).lines() if well_formed(graph) else _plain(graph)
    return "\n".join(_printable(line) for line in (title, *lines))


def _plain(graph: Graph) -> Iterator[str]:
    """One node a line, as they are: for a document that would be refused."""
    expressions = Expressions(graph, lambda node: Code(f"%{node}"), lambda _: "")
    for node in graph.nodes:
        yield f"%{node.id} = {expressions.call(node).text}"


def _printable(line: str) -> str:
    """Without control characters, which could come in the names and texts of a document."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)


class _Line(NamedTuple):
    depth: int
    text: str
    node: Node
    note: str = ""

    def __str__(self) -> str:
        text = "    " * self.depth + self.text
        source = f"{self.node.source.file}:{self.node.source.line}" if self.node.source else ""
        comment = ", ".join(filter(None, [self.note, source]))
        return f"{text:<{_COMMENTS_AT}}  # {comment}" if comment else text


class Listing:
    """The lines of a well-formed graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._places = graph, layout(graph)
        self._expressions = Expressions(graph, self._code, self._where)
        self._position = {place.node: index for index, place in enumerate(self._places)}
        self._users: list[list[int]] = [[] for _ in graph.nodes]
        for node in graph.nodes:
            for ref in node.refs():
                self._users[ref].append(node.id)
        self._saved = {node: name for name, node in graph.saves.items()}
        self._statements = Statements(graph, self._places)
        self._codes: dict[int, Code] = {}  # how the value of a node is written where it is used
        self._held: dict[str, int] = {}  # names, and the node that each stands for now
        self._inside: tuple[int, ...] = ()
        self._written: set[int] = set()
        self._wheres = self._named_wheres()

    def lines(self) -> Iterator[str]:
        for place in self._places:
            self._inside = place.inside
            node = self._graph.nodes[place.node]
            for line in self._lines(place, node):
                yield str(line)

    def _lines(self, place: Place, node: Node) -> Iterator[_Line]:
        if node.id in self._written or node.op in _HIDDEN:
            return
        if node.op in OPENERS:
            yield from self._opening(place, node)
        elif node.op == SAVE:
            yield self._save(place, node)
        elif node.op in STATEMENTS or node.op in IN_PLACE:
            yield from self._statement(place, node)
        else:
            yield from self._value(place, node)

    def _opening(self, place: Place, node: Node) -> Iterator[_Line]:
        code = self._expressions.of(node)
        if node.op in FORWARDS or node.op == INVOKE:
            name = f" as {self._wheres[node.id]}" if node.id in self._wheres else ""
            yield _Line(place.depth, f"with {code.text}{name}:", node)
        elif node.op == LOOP:
            yield from self._initial_values(place, node)
            item = next((user for user in self._users[node.id] if self._graph.nodes[user].op == ITEM), None)
            name = "_" if item is None else self._name(item, loop_target(node) or "item")
            yield _Line(place.depth, f"for {name} in {code.text}:", node)
        else:
            self._codes[node.id] = code
            yield _Line(place.depth, "else:" if node.op == ELSE else f"if {code.text}:", node)

    def _initial_values(self, place: Place, loop: Node) -> Iterator[_Line]:
        """The variables of a loop before its first pass, where they do not have their names already."""
        for number in self._users[loop.id]:
            node = self._graph.nodes[number]
            if node.op != CARRIED:
                continue
            self._written.add(number)
            initial = self._expressions.value(node.args[1])
            known = initial.text if initial.text.isidentifier() and isinstance(node.args[1], Ref) else None
            name = self._name(number, known or self._next_name(number) or f"v{number}", also=node.args[1])
            if name != initial.text:
                yield _Line(place.depth, f"{name} = {initial.text}", node)

    def _next_name(self, carried: int) -> str | None:
        """What the program calls the value that a loop's variable gets in a pass."""
        nexts = (self._graph.nodes[user] for user in self._users[carried])
        values = (node.args[1] for node in nexts if node.op == NEXT and node.args[0] == Ref(carried))
        return next((self._statements.target(value.id) for value in values if isinstance(value, Ref)), None)

    def _statement(self, place: Place, node: Node) -> Iterator[_Line]:
        code = self._expressions.of(node)
        if node.op in IN_PLACE and node.args:
            self._codes[node.id] = self._expressions.value(node.args[0])
        if node.op == BACKWARD:
            self._codes[node.id] = Code(f"backward_{node.id}")
            code = Code(f"backward_{node.id} = {code.text}") if self._users[node.id] and self._backwards > 1 else code
        left, _, right = code.text.partition(" = ")
        if left != right:
            yield _Line(place.depth, code.text, node)

    @property
    def _backwards(self) -> int:
        return sum(node.op == BACKWARD for node in self._graph.nodes)

    def _save(self, place: Place, node: Node) -> _Line:
        name, code = self._saved.get(node.id), self._expressions.of(node)
        if name is not None and _SAVED.fullmatch(name) and f"{name}.save()" != code.text:
            return _Line(place.depth, f"{self._name(node.id, name)} = {code.text}", node, self._note(node.id, name))
        shown = f"{name}.save()" == code.text
        return _Line(place.depth, code.text, node, "" if name is None or shown else f"saved as {name!r}")

    def _note(self, save: int, name: str) -> str:
        """Said where the name of a save is not the one that is written."""
        saved = self._saved.get(save)
        return "" if saved is None or saved == name else f"saved as {saved!r}"

    def _value(self, place: Place, node: Node) -> Iterator[_Line]:
        """The line that gives a value its name; none where it is written in the one place that uses it."""
        if node.op in (FINAL, MERGE) and (same := self._same_name(node)):
            self._codes[node.id] = Code(same)
            self._held[same] = node.id
            return
        code = self._expressions.of(node)
        save = self._statements.save_of(node.id, self._users)
        wanted = self._statements.target(node.id)
        if save is None and self._is_inlined(node, wanted) and len(code.text) <= _WIDEST:
            self._codes[node.id] = code
            return
        saved = self._saved.get(save, "") if save is not None else ""
        name = self._name(node.id, saved if _SAVED.fullmatch(saved) else wanted or f"v{node.id}")
        if save is not None:
            self._written.add(save)
        ending = ".save()" if save is not None else ""
        text = f"{name} = {code.inside(20) if ending else code.text}{ending}"
        yield _Line(place.depth, text, node, "" if save is None else self._note(save, name))

    def _is_inlined(self, node: Node, wanted: str | None) -> bool:
        if node.op in _ATOMS:
            return wanted is None and bool(self._users[node.id]) and not self._changes_meanwhile(node)
        return self._statements.inlined(node.id, self._users)

    def _changes_meanwhile(self, node: Node) -> bool:
        """Whether the place that `node` reads is set to something else before the last use of what it read."""
        last = max(self._users[node.id], default=node.id)
        between = self._graph.nodes[node.id + 1 : last]
        return any(other.op in SETS.values() and path_of(other) == path_of(node) for other in between)

    def _same_name(self, node: Node) -> str | None:
        """The name that all that a merge chooses from, or the last value of a loop's variable, goes by already."""
        names = {self._expressions.value(value).text for value in node.args[1:]}
        return next((name for name in names if len(names) == 1 and name.isidentifier()), None)

    def _name(self, node: int, wanted: str, also: object = None) -> str:
        """Give the value of `node` the name that is wanted, or one like it where that still stands for something else.

        `also` refers to a value that may lose the name, because `node` starts as that value.
        """
        name, number = wanted, 2
        while name in self._held and self._held[name] != node and self._is_needed(self._held[name], node, also):
            name, number = f"{wanted}_{number}", number + 1
        self._held[name] = node
        self._codes[node] = Code(name)
        return name

    def _is_needed(self, holder: int, node: int, also: object) -> bool:
        """Whether something that comes after `node` uses `holder`, or they stand in different blocks."""
        nodes, here = self._graph.nodes, self._position[node]
        later = [user for user in self._users[holder] if self._position[self._lands(user)] > here]
        later = [user for user in later if nodes[user].op not in (NEXT, FINAL)]
        if also == Ref(holder):
            return any(nodes[user].op != CARRIED for user in later)
        merges = [user for user in later if nodes[user].op == MERGE and user in self._users[node]]
        if nodes[holder].block != nodes[node].block and not merges and nodes[holder].op not in (FINAL, MERGE):
            return True
        return any(user not in merges and not self._other_branch(user, node, merges) for user in later)

    def _other_branch(self, user: int, node: int, merges: list[int]) -> bool:
        """Whether `user` stands in the branch that is not run when the one with `node` is."""
        branch = self._graph.nodes[user].block
        opener = self._graph.nodes[branch] if branch is not None else None
        return bool(merges) and opener is not None and opener.op == ELSE and branch != self._graph.nodes[node].block

    def _lands(self, node: int) -> int:
        """The node in whose line `node` is written."""
        while self._statements.inlined(node, self._users):
            [node] = self._users[node]
        return node

    def _code(self, node: int) -> Code:
        return self._codes.get(node) or Code(f"v{node}")

    def _where(self, where: int) -> str:
        """What stands before a module: nothing in the block of its forward."""
        if self._inside and self._inside[-1] == where:
            return ""
        return f"{self._wheres[where]}." if where in self._wheres else ""

    def _named_wheres(self) -> dict[int, str]:
        """Names of forwards and invokes, of those kinds of which there are several."""
        names: dict[int, str] = {}
        for ops, word in ((FORWARDS, "trace"), ({INVOKE}, "invoke")):
            found = [node.id for node in self._graph.nodes if node.op in ops]
            if len(found) > 1:
                names |= {node: f"{word}_{number}" for number, node in enumerate(found, 1)}
        if any(node.op == INVOKE for node in self._graph.nodes):
            forwards = [node for node in self._graph.nodes if node.op in FORWARDS]
            names = {node.id: "generation" if node.op == GENERATE else "trace" for node in forwards} | names
        return names
