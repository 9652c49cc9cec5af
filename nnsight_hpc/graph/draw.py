"""A graph as a picture, laid out by Graphviz: the model's modules apart from the operations of the intervention."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from nnsight_hpc.graph.build import (
    CALL,
    ELSE,
    FORWARDS,
    IF,
    INVOKE,
    KIND_OF,
    LOOP,
    PARAMETER,
    READS,
    SAVE,
    SET_GRAD,
    SETS,
    SKIP,
)
from nnsight_hpc.graph.expressions import Code, Expressions, path_of
from nnsight_hpc.graph.nodes import Ref, leaves
from nnsight_hpc.graph.operations import IN_PLACE
from nnsight_hpc.wire.errors import InvalidGraph, InvalidInput, NotFound
from nnsight_hpc.wire.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.graph.nodes import Graph, Node

FORMATS = ("svg", "png", "pdf", "dot")
_SECONDS = 120
_LONGEST = 80
_MODULE = 'shape=box3d style=filled fillcolor="#cfe2f3" color="#3d6fa5"'
_OPERATION = 'shape=ellipse style=filled fillcolor="#fff2cc" color="#a07d1c"'
_CHANGE = 'shape=ellipse style=filled fillcolor="#f8cecc" color="#b5413c"'
_SAVE = 'shape=cds style=filled fillcolor="#d5e8d4" color="#4b8a3a"'
_CONTROL = 'shape=diamond style=filled fillcolor="#e1d5e7" color="#7a5c94"'
_POINTS = frozenset({*READS.values(), *SETS.values(), SKIP})
_CHANGES = frozenset({*SETS.values(), SKIP})
_BLOCKS = FORWARDS | {INVOKE, IF, ELSE, LOOP}


def draw(graph: Graph, file: str | Path) -> Path:
    """Write a picture of `graph` and return its path; see `Graph.draw`."""
    path = Path(file).expanduser()
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise InvalidInput(
            f"a graph cannot be drawn as {path.name!r}",
            next=f"end the name in one of {', '.join(f'.{f}' for f in FORMATS)}",
        )
    text = as_dot(graph).encode("utf-8", "replace")
    write_atomically(path, text if kind == "dot" else _laid_out(text, kind), mode=0o644)
    return path


def _laid_out(dot: bytes, kind: str) -> bytes:
    program = shutil.which("dot")
    if program is None:
        raise NotFound(
            "Graphviz is not installed",
            why="its program `dot` lays the graph out, and is not on the PATH",
            next="apt install graphviz, conda install -c conda-forge graphviz, or brew install graphviz (the package of "
            'that name on PyPI does not bring the program); draw("graph.dot") works without it',
        )
    try:
        ended = subprocess.run([program, f"-T{kind}"], input=dot, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise InvalidGraph(
            f"Graphviz did not lay the graph out within {_SECONDS} s",
            why="it is large",
            next='draw("graph.dot") writes it for other programs; print(graph) shows it as text',
        ) from None
    if ended.returncode:
        raise InvalidInput("Graphviz refused the graph", why=ended.stderr.decode(errors="replace").strip())
    return ended.stdout


def as_dot(graph: Graph) -> str:
    """The graph in the language of Graphviz: a cluster for each forward, invoke, conditional and loop."""
    return "\n".join(["digraph {", *_header(graph), *_Drawing(graph).statements(), *_legend(), "}", ""])


def _header(graph: Graph) -> Iterator[str]:
    yield f'  graph [label={_quoted(graph.model.id or "a module")} labelloc=t fontname="sans-serif" rankdir=TB];'
    yield '  node [fontname="sans-serif" fontsize=11]; edge [fontname="sans-serif" fontsize=9 color="#555555"];'


class _Drawing:
    """The statements of one graph. A module is one box in each forward; reads leave it, changes go to it."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._expressions = Expressions(graph, lambda _: Code("·"), lambda _: "")
        self._saves = {node: name for name, node in graph.saves.items()}
        self._nodes = {node.id: node for node in graph.nodes}
        self._modules: dict[tuple[int, str], str] = {}
        self._members: dict[int | None, list[str]] = {}
        self._edges: list[str] = []

    def statements(self) -> list[str]:
        for node in self._graph.nodes:
            self._add(node)
        return [*self._cluster(None, 1, frozenset()), *(f"  {edge}" for edge in self._edges)]

    def _add(self, node: Node) -> None:
        if node.op in _POINTS and (path := path_of(node)) is not None and isinstance(node.args[0], Ref):
            return self._add_point(node, path, node.args[0].id)
        if node.op in _BLOCKS:
            self._members.setdefault(self._parent(node), []).append(f"cluster_{node.id}")
        else:
            self._member(node, f"n{node.id} [label={_quoted(self._label(node))} {_style(node)}];")
        return self._connect(node, f"n{node.id}")

    def _add_point(self, node: Node, path: str, where: int) -> None:
        """Reads have no shape of their own: who uses them has an edge from the module."""
        if (where, path) not in self._modules:
            self._modules[where, path] = f"m{len(self._modules)}"
            text = f"{self._modules[where, path]} [label={_quoted(self._expressions.module(path))} {_MODULE}];"
            self._members.setdefault(where, []).append(text)
        if node.op in _CHANGES:
            self._member(node, f"n{node.id} [label={_quoted(self._label(node))} {_CHANGE}];")
            self._edges.append(f'n{node.id} -> {self._modules[where, path]} [color="#b5413c"];')
            for ref in dict.fromkeys(_refs(node.args[2:])):
                self._edge(ref, f"n{node.id}")

    def _member(self, node: Node, text: str) -> None:
        self._members.setdefault(node.block, []).append(text)

    def _parent(self, node: Node) -> int | None:
        """The cluster that a block stands in: an invoke in its forward."""
        if node.op == INVOKE and node.args and isinstance(node.args[0], Ref):
            return node.args[0].id
        return node.block

    def _connect(self, node: Node, name: str) -> None:
        for ref in dict.fromkeys(_refs([*node.args, *node.kwargs.values()])):
            if not (node.op == INVOKE or self._op(ref) in _BLOCKS):
                self._edge(ref, name if node.op not in _BLOCKS else f"b{node.id}")

    def _op(self, id: int) -> str:
        return self._nodes[id].op if id in self._nodes else ""

    def _edge(self, source: int, to: str) -> None:
        node = self._nodes.get(source)
        if node is None:
            return
        name, attributes = f"n{source}", ""
        if node.op in READS.values() and (path := path_of(node)) is not None and isinstance(node.args[0], Ref):
            name, attributes = self._modules[node.args[0].id, path], f"label={_quoted(KIND_OF[node.op])}"
        self._edges.append(f"{name} -> {to} [{attributes}];" if attributes else f"{name} -> {to};")

    def _cluster(self, block: int | None, depth: int, seen: frozenset[int]) -> Iterator[str]:
        for member in self._members.get(block, []):
            if not member.startswith("cluster_"):
                yield "  " * depth + member
                continue
            node = self._nodes[int(member.removeprefix("cluster_"))]
            if node.id in seen:
                continue
            label = _quoted(self._label(node))
            yield f'{"  " * depth}subgraph {member} {{ label={label} style=rounded color="#999999";'
            yield f"{'  ' * (depth + 1)}b{node.id} [{_anchor(node)}];"
            yield from self._cluster(node.id, depth + 1, seen | {node.id})
            yield "  " * depth + "}"

    def _label(self, node: Node) -> str:
        text = _WORDS.get(node.op) or self._expressions.of(node).text
        if node.op == SAVE:
            text = f"save {self._saves.get(node.id, '')}"
        where = f"\n{node.source.file}:{node.source.line}" if node.source else ""
        return (text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…") + where


_WORDS = {IF: "if", ELSE: "else", LOOP: "for each"}


def _anchor(node: Node) -> str:
    """What stands for a block itself: a diamond where it decides or repeats, nothing that is seen for a forward."""
    if node.op in (IF, LOOP):
        return f"label={_quoted('?' if node.op == IF else '∀')} {_CONTROL}"
    return 'shape=point style=invis width=0.01 label=""'


def _style(node: Node) -> str:
    if node.op == SAVE:
        return _SAVE
    if node.op in (CALL, PARAMETER):
        return _MODULE
    if node.op.startswith("control."):
        return _CONTROL
    return _CHANGE if node.op in IN_PLACE or node.op == SET_GRAD else _OPERATION


def _refs(values: list[object] | tuple[object, ...]) -> Iterator[int]:
    return (leaf.id for leaf in leaves(list(values)) if isinstance(leaf, Ref))


def _legend() -> Iterator[str]:
    entries = {
        "module of the model": _MODULE,
        "operation": _OPERATION,
        "change": _CHANGE,
        "saved value": _SAVE,
    }
    entries["control"] = _CONTROL
    yield '  subgraph cluster_legend { label="legend" style=dashed color="#999999" fontsize=10;'
    for number, (text, style) in enumerate(entries.items()):
        yield f"    legend{number} [label={_quoted(text)} {style} fontsize=9];"
    yield "    " + " -> ".join(f"legend{number}" for number in range(len(entries))) + " [style=invis];"
    yield "  }"


def _quoted(text: str) -> str:
    """A label of Graphviz that shows exactly `text`: no escape, no entity, no control character of it has an effect."""
    shown = "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
    shown = shown.replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;").replace("\n", "\\n")
    return f'"{shown}"'
