"""One node of a graph as the Python expression that it stands for: ``model.layers[3].output``, ``h[:, -1] * 2``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from nnsight_hpc.graph.build import (
    APPEND,
    APPLY,
    BACKWARD,
    CALL,
    CARRIED,
    CHECK,
    COLLECT,
    DICT,
    FINAL,
    FORWARDS,
    GENERATE,
    IF,
    INVOKE,
    ITEM,
    KIND_OF,
    LEAVE,
    LENGTH,
    LIST,
    LOG,
    LOOP,
    MERGE,
    NEXT,
    PARAMETER,
    RANGE,
    REACHED,
    READ_GRAD,
    READS,
    RESULT,
    SAVE,
    SET_GRAD,
    SETS,
    SKIP,
)
from nnsight_hpc.graph.nodes import Device, DType, Graph, Held, Node, Ref, Seed, TensorRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_ATOM = 20
_UNARY = {"neg": "-", "pos": "+", "invert": "~", "not_": "not "}
_RANKS = {
    14: {"pow": "**"},
    12: {"mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "matmul": "@"},
    11: {"add": "+", "sub": "-"},
    10: {"lshift": "<<", "rshift": ">>"},
    9: {"and_": "&"},
    8: {"xor": "^"},
    7: {"or_": "|"},
    6: {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="},
}
_SYMBOLS = {name: (symbol, rank) for rank, names in _RANKS.items() for name, symbol in names.items()}
_LONGEST = 60
"""Characters of a string constant that are shown."""


class Code(NamedTuple):
    """An expression and how tightly its outermost operator binds (Python's order; names and calls the tightest)."""

    text: str
    rank: int = _ATOM

    def inside(self, rank: int) -> str:
        """As an operand of something that binds with `rank`."""
        return self.text if self.rank >= rank else f"({self.text})"


class Expressions:
    """Writes nodes of one graph.

    Parameters
    ----------
    name
        The text that stands for the value of a node, by its id.
    where
        What stands before a module for a point of this forward or invoke: nothing, or ``trace_2.``.
    """

    def __init__(self, graph: Graph, name: Callable[[int], Code], where: Callable[[int], str]) -> None:
        self._graph, self._name, self._where = graph, name, where
        paths = [part for node in graph.nodes if (part := path_of(node)) is not None]
        self._several_backwards = sum(node.op == BACKWARD for node in graph.nodes) > 1
        self._root = "root" if any(re.match(r"model\b", path) for path in paths) else "model"

    def of(self, node: Node) -> Code:
        """The node as an expression or statement; one with arguments that it should not have as a plain call."""
        write = _SPECIAL.get(node.op) or _by_kind(node.op)
        try:
            return write(self, node)
        except (IndexError, TypeError, ValueError, AttributeError):
            return self.call(node)

    def call(self, node: Node) -> Code:
        return Code(f"{node.op}({self.arguments(node.args, node.kwargs.items())})")

    def arguments(self, args: Iterable[Any], kwargs: Iterable[tuple[str, Any]] = ()) -> str:
        return ", ".join([*(self.value(a).text for a in args), *(f"{k}={self.value(v).text}" for k, v in kwargs)])

    def value(self, value: Any) -> Code:
        """A constant, a reference, or a nesting of them."""
        if isinstance(value, Ref):
            return self._name(value.id)
        if isinstance(value, TensorRef):
            return Code(self._tensor(value.name))
        if isinstance(value, DType | Device):
            return Code(f"torch.{value.name}" if isinstance(value, DType) else repr(value.name))
        if isinstance(value, Held):
            return Code(f"objects[{value.number}]")
        if isinstance(value, Seed):
            return Code(f"seed({value.number})")
        if isinstance(value, list):
            return Code(f"[{self.arguments(value)}]")
        if isinstance(value, tuple):
            return Code(f"({self.arguments(value)}{',' if len(value) == 1 else ''})")
        if isinstance(value, dict):
            return Code("{" + ", ".join(f"{key!r}: {self.value(item).text}" for key, item in value.items()) + "}")
        if isinstance(value, slice):
            return Code(f"slice({self.arguments((value.start, value.stop, value.step))})")
        return _constant(value)

    def index(self, value: Any) -> str:
        """What stands between the brackets of ``h[:, -1]``."""
        if isinstance(value, tuple) and value:
            return ", ".join(map(self.index, value)) + ("," if len(value) == 1 else "")
        if isinstance(value, slice):
            parts = [value.start, value.stop] + ([] if value.step is None else [value.step])
            return ":".join("" if part is None else self.value(part).text for part in parts)
        return self.value(value).text

    def module(self, path: str) -> str:
        """A module by its path; an operation inside of it by its name."""
        path, *operations = path.split(":")
        parts = path.split(".") if path else []
        if not parts or not parts[0].isidentifier():
            parts.insert(0, self._root)
        text = parts[0]
        for part in parts[1:]:
            text += f"[{part}]" if part.isdecimal() else f".{part}" if part.isidentifier() else f".get({part!r})"
        return ".source.".join([text, *operations])

    def at(self, where: Any, path: str, call: Any = 0) -> str:
        """A module in one call of the model."""
        module = self._where(where.id) + self.module(path)
        return f"{module}.calls[{self.value(call).text}]" if call else module

    def point(self, node: Node) -> str:
        where, path, *_ = node.args
        return f"{self.at(where, path, node.kwargs.get('call', 0))}.{KIND_OF[node.op]}"

    def set_point(self, node: Node) -> Code:
        return Code(f"{self.point(node)} = {self.value(node.args[2]).text}", 0)

    def skip(self, node: Node) -> Code:
        where, path, value = node.args
        return Code(f"{self.at(where, path, node.kwargs.get('call', 0))}.skip({self.value(value).text})")

    def forward(self, node: Node) -> Code:
        method = "generate" if node.op == GENERATE else "trace"
        return Code(f"{self._root}.{method}({self.arguments(node.args, node.kwargs.items())})")

    def invoke(self, node: Node) -> Code:
        _forward, start, stop = node.args
        return Code(f"invoke(rows {self.value(start).text} to {self.value(stop).text})")

    def result(self, node: Node) -> Code:
        return Code(f"{self._where(node.args[0].id)}result")

    def parameter(self, node: Node) -> Code:
        path, name = node.args
        return Code(f"{self.module(path)}.{name}")

    def call_module(self, node: Node) -> Code:
        return Code(f"{self.module(node.args[0])}({self.arguments(node.args[1:], node.kwargs.items())})")

    def method(self, node: Node) -> Code:
        name = "save" if node.op == SAVE else node.op.rpartition(".")[2]
        given = {key: value for key, value in node.kwargs.items() if value is not False or node.op != BACKWARD}
        return Code(f"{self.value(node.args[0]).inside(_ATOM)}.{name}({self.arguments(node.args[1:], given.items())})")

    def attribute(self, node: Node) -> Code:
        value, name = node.args
        text = self.value(value).inside(_ATOM)
        return Code(f"{text}.{name}" if name.isidentifier() else f"{text}[{name!r}]")

    def gradient(self, node: Node) -> Code:
        text = f"{self.value(node.args[0]).inside(_ATOM)}.grad"
        if self._several_backwards and "backward" in node.kwargs:
            text = f"{text}[{self.value(node.kwargs['backward']).text}]"
        return Code(f"{text} = {self.value(node.args[1]).text}", 0) if node.op == SET_GRAD else Code(text)

    def operator(self, node: Node) -> Code:
        name = node.op.removeprefix("operator.")
        first = self.value(node.args[0])
        if name in ("getitem", "setitem"):
            text = f"{first.inside(_ATOM)}[{self.index(node.args[1])}]"
            return Code(f"{text} = {self.value(node.args[2]).text}", 0) if name == "setitem" else Code(text)
        if name in _UNARY:
            return Code(f"{_UNARY[name]}{first.inside(13)}", 13)
        second = self.value(node.args[1])
        if name.startswith("i") and (name[1:] in _SYMBOLS or f"{name[1:]}_" in _SYMBOLS):
            symbol, _ = _SYMBOLS.get(name[1:]) or _SYMBOLS[f"{name[1:]}_"]
            return Code(f"{first.text} {symbol}= {second.text}", 0)
        if name not in _SYMBOLS:
            return self.call(node)
        symbol, rank = _SYMBOLS[name]
        left, right = (rank + 1, rank) if name == "pow" else (rank, rank + 1)
        return Code(f"{first.inside(left + (rank == 6))} {symbol} {second.inside(right)}", rank)

    def control(self, node: Node) -> Code:
        values = [self.value(value) for value in node.args]
        if node.op == MERGE:
            taken, a, b = values
            return Code(f"{a.inside(3)} if {taken.inside(3)} else {b.inside(2)}", 2)
        if node.op == NEXT:
            return Code(f"{values[0].text} = {values[1].text}", 0)
        if node.op == COLLECT:
            return Code(f"[{values[1].text} of every pass]")
        return values[1] if node.op in (FINAL, CARRIED) else Code(self.value(Ref(node.id)).text)

    def container(self, node: Node) -> Code:
        if node.op == DICT:
            return Code(f"dict({self.arguments(node.args, node.kwargs.items())})")
        return Code(f"[{self.arguments(node.args)}]")

    def function(self, node: Node) -> Code:
        return Code(f"{_FUNCTIONS[node.op]}({self.arguments(node.args, node.kwargs.items())})")

    def header(self, node: Node) -> Code:
        """The condition of an ``if``; what a loop goes over."""
        return self.value(node.args[0])

    def _tensor(self, name: str) -> str:
        tensor = self._graph.tensors.get(name)
        if tensor is None:
            return f"<{name}>"
        return f"<{name} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}>"


def path_of(node: Node) -> str | None:
    """The module that a node names, if it names one."""
    if node.op in (PARAMETER, CALL):
        place = node.args[:1]
    else:
        place = node.args[1:2] if node.op in KIND_OF or node.op == SKIP else ()
    return place[0] if place and isinstance(place[0], str) else None


def _constant(value: Any) -> Code:
    if value is ...:
        return Code("...")
    text = repr(value)
    if isinstance(value, str) and len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}…'"
    negative = isinstance(value, int | float) and text.startswith("-")
    return Code(text, 13 if negative else _ATOM)


def _by_kind(op: str) -> Callable[[Expressions, Node], Code]:
    if op.startswith("operator."):
        return Expressions.operator
    return Expressions.method if op.startswith("Tensor.") else Expressions.call


_FUNCTIONS = {
    RANGE: "range",
    LENGTH: "len",
    LOG: "print",
    APPLY: "apply",
    CHECK: "check",
    LEAVE: "leave",
    REACHED: "reached",
}

_SPECIAL: dict[str, Callable[[Expressions, Node], Code]] = {
    **dict.fromkeys(READS.values(), lambda writer, node: Code(writer.point(node))),
    **dict.fromkeys(SETS.values(), Expressions.set_point),
    **dict.fromkeys(FORWARDS, Expressions.forward),
    **dict.fromkeys((SAVE, BACKWARD, APPEND), Expressions.method),
    **dict.fromkeys((READ_GRAD, SET_GRAD), Expressions.gradient),
    **dict.fromkeys((MERGE, NEXT, COLLECT, FINAL, CARRIED, ITEM), Expressions.control),
    **dict.fromkeys((LIST, DICT), Expressions.container),
    **dict.fromkeys(_FUNCTIONS, Expressions.function),
    **dict.fromkeys((IF, LOOP), Expressions.header),
    SKIP: Expressions.skip,
    INVOKE: Expressions.invoke,
    RESULT: Expressions.result,
    PARAMETER: Expressions.parameter,
    CALL: Expressions.call_module,
    "attribute": Expressions.attribute,
}
