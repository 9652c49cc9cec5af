"""A deferred value: stands for what a node of the graph will give, and records what is done with it.

Operators, indexing, listed methods and attributes, and torch functions that get one as an argument become nodes. Whatever
would need the value now (its truth, its length, iterating over it) raises and says so; under `scan` and `validate` a fake
tensor tells shapes, dtypes and devices.
"""

from __future__ import annotations

import dis
import functools
import operator
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from nnsight_hpc.execution.values import Absent
from nnsight_hpc.graph.build import APPEND, DICT, LIST, READ_GRAD, SET_GRAD
from nnsight_hpc.graph.operations import ALLOWED, ATTRIBUTES, DENIED_KEYWORDS, FIELDS, FIELDS_OF, IN_PLACE, why_refused
from nnsight_hpc.tracing.gradients import Backward
from nnsight_hpc.tracing.lines import users_frame, users_line
from nnsight_hpc.wire.errors import InvalidGraph, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from nnsight_hpc.tracing.recorder import Recorder


class Value:
    """What a node gives; `saved` is the id of its save, once it has one; `fake` what is known of it under scan."""

    __slots__ = ("fake", "node", "recorder", "saved")

    def __init__(self, recorder: Recorder, node: int, saved: int | None = None, fake: Any = None) -> None:
        self.recorder, self.node, self.saved, self.fake = recorder, node, saved, fake

    def save(self) -> Value:
        """Keep the value as it is at this line: after the block, the names that hold it are bound to the real thing.

        A list or dict of the block (``tracer.list()``) is kept as it is at the end of the block.
        """
        node = self.recorder.builder.nodes[self.node]
        if node.op in (LIST, DICT) and node.block is None:
            self.recorder.save_at_the_end(self)
            return self
        saved = self.recorder.save(self)
        if self.saved is None:
            self.saved = saved
        return Value(self.recorder, self.node, saved, self.fake)

    def result(self) -> Any:
        """The real thing, after the run; raises `InvalidInput` when there is none."""
        if self.saved is None or self.saved not in self.recorder.results:
            node = self.recorder.builder.nodes[self.node]
            raise InvalidInput(
                "this value has no result" + ("" if self.saved is None else " yet"),
                where=str(node.source or ""),
                why="it was not saved" if self.saved is None else "its block has not run, or failed",
                next="keep it with .save() inside the block",
            )
        found = self.recorder.outcome(self)
        if isinstance(found, Absent):
            node = self.recorder.builder.nodes[self.node]
            raise InvalidInput("this value was never made", where=str(node.source or ""), why=found.why)
        return found

    @property
    def grad(self) -> Value:
        """The gradient of this value, in the backward pass whose block this is, or else in the next one."""
        return self.recorder.gradient(READ_GRAD, self)

    @grad.setter
    def grad(self, new: Any) -> None:
        self.recorder.gradient(SET_GRAD, self, new)

    def backward(self, gradient: Any = None, *, retain_graph: bool = False, create_graph: bool = False) -> Backward:
        """Compute gradients from this value. ``with loss.backward():`` names the gradients of this very pass."""
        options = {"gradient": gradient, "retain_graph": retain_graph, "create_graph": create_graph}
        given = {name: value for name, value in options.items() if value is not None and value is not False}
        return Backward(self.recorder, self.recorder.backpropagate(self, given))

    def append(self, item: Any) -> None:
        """Append to a list that lives where the graph runs (``tracer.list()``)."""
        self.recorder.record(APPEND, self, item)

    def extend(self, items: Iterable[Any]) -> None:
        """Append each of `items`, whose number is known here, to such a list."""
        for item in items:
            self.append(item)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        op = _op_of(function)
        if op in _DROPOUTS and (kwargs or {}).get("training") is False:
            return args[0]
        outside = op in IN_PLACE and type(args[0]) is not Value
        if (reason := why_refused(op)) or outside:
            raise InvalidGraph(
                f"{op} {reason or 'on a tensor from outside of the block cannot be recorded: only values can be changed'}",
                where=str(users_line()),
                next="the allowed operations are listed in the documentation",
            )
        recorder = next(leaf.recorder for leaf in _flat((args, kwargs or {})) if type(leaf) is Value)
        return recorder.record(op, *args, **{key: v for key, v in (kwargs or {}).items() if not _is_default(key, v)})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in _FACTS and isinstance(self.fake, torch.Tensor):
            return getattr(self.fake, name)
        op = self.recorder.builder.nodes[self.node].op
        if name not in ATTRIBUTES and name not in FIELDS_OF.get(op, ()):
            if f"Tensor.{name}" in ALLOWED:
                return functools.partial(self.recorder.record, f"Tensor.{name}", self)
            if name not in FIELDS and hasattr(torch.Tensor, name):
                raise InvalidGraph(f"Tensor.{name} {why_refused(f'Tensor.{name}')}", where=str(users_line()))
        return self.recorder.record("attribute", self, name)

    def __getitem__(self, index: Any) -> Value:
        return self.recorder.record("operator.getitem", self, index)

    def __setitem__(self, index: Any, new: Any) -> None:
        self.recorder.record("operator.setitem", self, index, new)

    def __repr__(self) -> str:
        node = self.recorder.builder.nodes[self.node]
        return f"<value of {node.op}, {node.source}>"

    def _now(self, what: str, next: str = "save the value and look at it after the block") -> NoReturn:
        raise InvalidInput(
            f"{what} of a value is not known while the block is recorded",
            where=str(users_line()),
            why="the model has not run yet",
            next=next,
        )

    def __bool__(self) -> bool:  # noqa: PLE0304 - it never returns
        self._now("the truth", "write `with tracer.cond(value):`, and `.else_()` for what is to happen otherwise")

    def __len__(self) -> int:
        if isinstance(self.fake, torch.Tensor | tuple | list | dict):
            return len(self.fake)
        return self._now("the length", "use value.shape[0], a value itself; in a trace with scan=True it is known")

    def __iter__(self) -> Iterator[Any]:
        count = len(self.fake) if isinstance(self.fake, torch.Tensor | tuple | list) else _unpacked_into()
        if count is None:
            self._now(
                "the number of elements", "write `for item in session.iter(value):`; tracer.iter[…] loops over steps"
            )
        return iter([self[index] for index in range(count)])

    def __float__(self) -> float:
        self._now("the number")

    def __int__(self) -> int:
        self._now("the number")

    __index__ = __int__

    def __contains__(self, _item: Any) -> bool:
        self._now("the content")

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        self._now("the content")

    __hash__ = object.__hash__
    __array_ufunc__ = None  # so that `array / value` asks the value, and does not make an array of values


_DROPOUTS = frozenset(f"torch.{name}" for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"))
"""Functions that do nothing in evaluation, so that a module with a dropout in it can be recorded."""

_FACTS = frozenset({"shape", "dtype", "device", "ndim"})
"""Attributes that a fake tensor knows."""


def _unpacked_into() -> int | None:
    """How many names the researcher's line unpacks something into (``values, indices = x.topk(3)``), if it does."""
    frame = users_frame()
    code = frame.f_code.co_code
    return code[frame.f_lasti + 1] if code[frame.f_lasti] == dis.opmap["UNPACK_SEQUENCE"] else None


def _is_default(key: str, value: Any) -> bool:
    """Whether torch itself added this argument: its Python functions hand on those that a graph does not take, switched off."""
    return key == "_stacklevel" or (key in DENIED_KEYWORDS and isinstance(value, bool | float | None) and not value)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def _binary(name: str) -> Callable[[Value, Any], Value]:
    return lambda self, other: self.recorder.record(f"operator.{name}", self, other)


def _reflected(name: str) -> Callable[[Value, Any], Value]:
    return lambda self, other: self.recorder.record(f"operator.{name}", other, self)


def _unary(name: str) -> Callable[[Value], Value]:
    return lambda self: self.recorder.record(f"operator.{name}", self)


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
for _name in _BINARY:
    _plain = _name.rstrip("_")
    setattr(Value, f"__{_plain}__", _binary(_name))
    setattr(Value, f"__r{_plain}__", _reflected(_name))
    if hasattr(operator, f"i{_plain}") and f"operator.i{_plain}" in ALLOWED:
        setattr(Value, f"__i{_plain}__", _binary(f"i{_plain}"))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Value, f"__{_name}__", _binary(_name))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(Value, f"__{_name}__", _unary(_name))


@functools.cache
def _op_of(function: Callable[..., Any]) -> str:
    """The name of a torch function in a graph; for one that has none, its own, to be refused by."""
    return _functions().get(function) or f"torch.{getattr(function, '__name__', function)}"


@functools.cache
def _functions() -> dict[Callable[..., Any], str]:
    """Each allowed operation's name by the function that torch hands to ``__torch_function__`` for it."""
    namespaces = {
        "Tensor": torch.Tensor,
        "torch": torch,
        "torch.nn.functional": torch.nn.functional,
        "torch.linalg": torch.linalg,
        "torch.fft": torch.fft,
        "torch.special": torch.special,
    }
    found: dict[Callable[..., Any], str] = {}
    for op in sorted(ALLOWED):
        namespace, _, name = op.rpartition(".")
        if namespace in namespaces:
            if (function := getattr(namespaces[namespace], name, None)) is not None:  # not in every version of torch
                found.setdefault(function, op)
        elif namespace == "operator" and hasattr(torch.Tensor, f"__{name.rstrip('_')}__"):
            found.setdefault(getattr(torch.Tensor, f"__{name.rstrip('_')}__"), op)
    return found
