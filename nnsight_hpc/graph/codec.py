"""Graphs as JSON documents, and back.

A document is ``{"format", "version", "model", "kind", "nodes": [{"id", "op", "args", "kwargs", "block",
"source"}], "saves"}``; what is empty is left out of a node. JSON's own null, booleans, integers, finite numbers, strings and
lists stand for themselves. Everything else is an object with exactly one key that names its type::

    {"ref": 3}  {"tensor": "t0"}  {"tuple": […]}  {"dict": [[key, value], …]}  {"slice": [start, stop, step]}
    {"ellipsis": true}  {"float": "nan" | "inf" | "-inf"}  {"complex": [re, im]}  {"dtype": "float32"}  {"device": "cpu"}
    {"seed": 7}

What does not have this form is refused with the place where it stands; nothing is guessed.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from typing import TYPE_CHECKING, Any, NoReturn

from nnsight_hpc.graph.effort import spend
from nnsight_hpc.graph.limits import (
    MAX_DEPTH,
    MAX_DOCUMENT_BYTES,
    MAX_INTEGER,
    MAX_LINE,
    MAX_NAME,
    MAX_PATH,
    MAX_STRING,
)
from nnsight_hpc.graph.nodes import Device, DType, Graph, Held, Node, Ref, Seed, Source, TensorRef
from nnsight_hpc.wire.errors import InvalidGraph
from nnsight_hpc.wire.messages import ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Callable

FORMAT = "nnsight-hpc/graph"
VERSION = 1


def dump_graph(graph: Graph) -> str:
    document = {
        "format": FORMAT,
        "version": VERSION,
        "model": {"id": graph.model.id, "fingerprint": graph.model.fingerprint, "revision": graph.model.revision},
        "kind": graph.kind,
        "nodes": [_dump_node(node) for node in graph.nodes],
        "saves": dict(graph.saves),
    }
    return json.dumps(document, allow_nan=False, separators=(",", ":"), ensure_ascii=False)


def _dump_node(node: Node) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": node.id, "op": node.op}
    if node.args:
        entry["args"] = [dump_value(value) for value in node.args]
    if node.kwargs:
        entry["kwargs"] = {key: dump_value(value) for key, value in node.kwargs.items()}
    if node.block is not None:
        entry["block"] = node.block
    if node.source is not None:
        entry["source"] = [node.source.file[-MAX_PATH:], node.source.line, node.source.text[:MAX_LINE]]
    return entry


def dump_value(value: Any) -> Any:
    """A nested argument as JSON; raises `InvalidGraph` for a type that a graph cannot hold."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list):
        return [dump_value(item) for item in value]
    for kind, tag, payload in _TAGGED:
        if isinstance(value, kind):
            return {tag: payload(value)}
    if isinstance(value, Held):
        raise InvalidGraph(
            "a Python object or function of this process cannot be part of a document",
            why="a graph that a forward or tracer.apply was given one for runs only here",
        )
    raise InvalidGraph(
        f"a value of type {type(value).__module__}.{type(value).__qualname__} cannot be part of a graph",
        why="a graph holds numbers, strings, slices, tensors, dtypes, devices, and lists, tuples and dicts of them",
    )


_TAGGED: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (Ref, "ref", lambda v: v.id),
    (TensorRef, "tensor", lambda v: v.name),
    (DType, "dtype", lambda v: v.name),
    (Device, "device", lambda v: v.name),
    (Seed, "seed", lambda v: v.number),
    (tuple, "tuple", lambda v: [dump_value(item) for item in v]),
    (dict, "dict", lambda v: [[dump_value(key), dump_value(item)] for key, item in v.items()]),
    (slice, "slice", lambda v: [dump_value(part) for part in (v.start, v.stop, v.step)]),
    (type(...), "ellipsis", lambda _: True),
    (complex, "complex", lambda v: [v.real, v.imag]),
)


def load_graph(document: str | bytes) -> Graph:
    if len(document) > MAX_DOCUMENT_BYTES:
        raise InvalidGraph(f"the graph has {len(document)} bytes", why=f"the limit is {MAX_DOCUMENT_BYTES}")
    top = _object(_parse(document), "the document")
    if top.pop("format", None) != FORMAT:
        raise InvalidGraph("this is not an intervention graph", why=f'its "format" is not {FORMAT!r}')
    if (version := top.pop("version", None)) != VERSION:
        raise InvalidGraph(f"the graph has version {_shown(version)}", why=f"this program reads version {VERSION}")
    _only(top, {"model", "kind", "nodes", "saves"}, "the document")
    kind = _name(top.get("kind"), "kind")
    nodes = _list(top.get("nodes"), "nodes")
    saves = _object(top.get("saves"), "saves")
    return Graph(
        nodes=tuple(_load_node(entry, f"nodes[{index}]") for index, entry in enumerate(nodes)),
        saves={_name(name, "saves"): _integer(node, f"saves[{_shown(name)}]") for name, node in saves.items()},
        model=_load_model(top.get("model")),
        kind=kind,
    )


def _parse(document: str | bytes) -> Any:
    try:
        return json.loads(document, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidGraph("the graph is nested too deeply", why=f"the limit is {MAX_DEPTH}") from None
    except ValueError as error:  # also: not UTF-8, and Python's limit on the digits of an integer
        raise InvalidGraph("the graph is not valid JSON", why=str(error)) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"duplicate key {_shown(counts.most_common(1)[0][0])}")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is no JSON number; write {{"float": …}}')


def _load_model(entry: Any) -> ModelIdentity:
    model = _object(entry, "model")
    _only(model, {"id", "fingerprint", "revision"}, "model")
    revision = model.get("revision")
    return ModelIdentity(
        id=_text(model.get("id"), "model.id", MAX_PATH),
        fingerprint=_name(model.get("fingerprint", ""), "model.fingerprint"),
        revision=None if revision is None else _name(revision, "model.revision"),
    )


def _load_node(entry: Any, where: str) -> Node:
    spend(5)
    node = _object(entry, where)
    _only(node, {"id", "op", "args", "kwargs", "block", "source"}, where)
    kwargs = _object(node.get("kwargs", {}), f"{where}.kwargs")
    return Node(
        id=_integer(node.get("id"), f"{where}.id"),
        op=_name(node.get("op"), f"{where}.op"),
        args=tuple(load_value(v, f"{where}.args", 0) for v in _list(node.get("args", []), f"{where}.args")),
        kwargs={
            _name(key, f"{where}.kwargs"): load_value(value, f"{where}.kwargs.{_shown(key)}", 0)
            for key, value in kwargs.items()
        },
        source=_load_source(node["source"], f"{where}.source") if "source" in node else None,
        block=_integer(node["block"], f"{where}.block") if "block" in node else None,
    )


def _load_source(entry: Any, where: str) -> Source:
    parts = _list(entry, where)
    if len(parts) != 3:
        _refuse(where, "has not the form [file, line, text]")
    return Source(_text(parts[0], where, MAX_PATH), _integer(parts[1], where), _text(parts[2], where, MAX_LINE))


def load_value(value: Any, where: str, depth: int) -> Any:
    """A nested argument from its JSON form."""
    if depth > MAX_DEPTH:
        _refuse(where, f"is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _integer(value, where)
    if isinstance(value, float):
        return _finite(value, where)
    if isinstance(value, str):
        return _text(value, where)
    spend(1)
    if isinstance(value, list):
        return [load_value(item, where, depth + 1) for item in value]
    if len(value) != 1:
        _refuse(where, "is an object with not exactly one key")
    [(tag, payload)] = value.items()
    if tag not in _LOADERS:
        _refuse(where, f"has the unknown type {_shown(tag)}; known are {', '.join(sorted(_LOADERS))}")
    return _LOADERS[tag](payload, where, depth + 1)


def _load_dict(payload: Any, where: str, depth: int) -> dict[str, Any]:
    pairs = [_list(pair, where) for pair in _list(payload, where)]
    if any(len(pair) != 2 for pair in pairs):
        _refuse(where, "has a dict entry that is not a pair")
    result = {_text(key, where): load_value(item, where, depth) for key, item in pairs}
    if len(result) != len(pairs):
        _refuse(where, "has a dict with a duplicate key")
    return result


def _load_slice(payload: Any, where: str, depth: int) -> slice:
    parts = [load_value(part, where, depth) for part in _list(payload, where)]
    if len(parts) != 3 or not all(part is None or isinstance(part, int | Ref) for part in parts):
        _refuse(where, "has a slice that is not [start, stop, step] of integers, nodes or null")
    return slice(*parts)


def _load_complex(payload: Any, where: str, _depth: int) -> complex:
    parts = _list(payload, where)
    if len(parts) != 2 or not all(isinstance(part, int | float) and not isinstance(part, bool) for part in parts):
        _refuse(where, "has a complex number that is not [re, im]")
    if any(isinstance(part, int) and abs(part) > MAX_INTEGER for part in parts):
        _refuse(where, "has a complex number with an integer of more than 64 bits")
    return complex(_finite(float(parts[0]), where), _finite(float(parts[1]), where))


def _load_float(payload: Any, where: str, _depth: int) -> float:
    if payload not in ("nan", "inf", "-inf"):
        _refuse(where, "has a float that is none of nan, inf, -inf")
    return float(payload)


def _load_ellipsis(payload: Any, where: str, _depth: int) -> Any:
    if payload is not True:
        _refuse(where, "has an ellipsis that is not true")
    return ...


_LOADERS: dict[str, Callable[[Any, str, int], Any]] = {
    "ref": lambda payload, where, _: Ref(_integer(payload, where)),
    "tensor": lambda payload, where, _: TensorRef(_name(payload, where)),
    "dtype": lambda payload, where, _: DType(_name(payload, where)),
    "device": lambda payload, where, _: Device(_name(payload, where)),
    "seed": lambda payload, where, _: Seed(_integer(payload, where)),
    "tuple": lambda payload, where, depth: tuple(load_value(v, where, depth) for v in _list(payload, where)),
    "dict": _load_dict,
    "slice": _load_slice,
    "complex": _load_complex,
    "float": _load_float,
    "ellipsis": _load_ellipsis,
}


def _refuse(where: str, problem: str) -> NoReturn:
    raise InvalidGraph(f"{where} {problem}", next="see docs/spec/graph.md for the form of a graph")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(where, "is not an object")
    return dict(value)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        _refuse(where, "is not a list")
    return list(value)


def _only(value: dict[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(value) - known):
        _refuse(where, f"has the unknown key {_shown(unknown[0])}; known are {', '.join(sorted(known))}")


def _text(value: Any, where: str, limit: int = MAX_STRING) -> str:
    if not isinstance(value, str):
        _refuse(where, "is not a string")
    if len(value) > limit:
        _refuse(where, f"is a string of {len(value)} characters; the limit is {limit}")
    return value


def _name(value: Any, where: str) -> str:
    return _text(value, where, MAX_NAME)


_shown = reprlib.repr
"""What a refusal shows of something that a document has: the beginning."""


def _integer(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse(where, "is not an integer")
    if abs(value) > MAX_INTEGER:
        _refuse(where, "is an integer of more than 64 bits")
    return value


def _finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        _refuse(where, "is a number beyond the range of a double")
    return value
