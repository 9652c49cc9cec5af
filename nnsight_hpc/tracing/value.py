"""A deferred value: stands for what a node of the graph will give, and records what is done with it.

Operators, indexing, listed methods and attributes, and torch functions that get one as an argument become nodes. Whatever
would need the value now (its truth, its length, iterating over it) raises and says so; under `scan` and `validate` a fake
tensor tells shapes, dtypes and devices.

Once its block has run, a saved value that no name of the researcher's holds (an attribute of an object does) acts as its
result.
"""

from __future__ import annotations

import copy
import difflib
import dis
import functools
import operator
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from nnsight_hpc.execution.values import Absent
from nnsight_hpc.graph.build import APPEND, DICT, LIST, READ_GRAD, READS, SET_GRAD
from nnsight_hpc.graph.operations import ALLOWED, ATTRIBUTES, DENIED_KEYWORDS, FIELDS, FIELDS_OF, IN_PLACE, why_refused
from nnsight_hpc.tracing.block_run import why_unrecorded
from nnsight_hpc.tracing.current import trace_now
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
        recorder = self.recorder
        node = recorder.builder.nodes[self.node]
        if node.op in _CONTAINERS and node.block is None:
            recorder.save_at_the_end(self)
            return self
        saved = recorder.save(self)
        if self.saved is not None:
            return Value(recorder, self.node, saved, self.fake)
        self.saved = saved
        return self

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
    def _settled(self) -> bool:
        """Whether the block has run and there is a result, which the value then acts as."""
        return self.saved is not None and self.recorder.settled and self.saved in self.recorder.results

    @property
    def grad(self) -> Any:
        """The gradient of this value, in the backward pass whose block this is, or else in the next one."""
        if self._settled:
            return self.result().grad
        return self.recorder.gradient(READ_GRAD, self)

    @grad.setter
    def grad(self, new: Any) -> None:
        self.recorder.gradient(SET_GRAD, self, new)

    def backward(self, gradient: Any = None, *, retain_graph: bool = False, create_graph: bool = False) -> Any:
        """Compute gradients from this value. ``with loss.backward():`` names the gradients of this very pass."""
        if self._settled:
            return self.result().backward(gradient, retain_graph=retain_graph, create_graph=create_graph)
        options = {"gradient": gradient, "retain_graph": retain_graph, "create_graph": create_graph}
        given = {name: value for name, value in options.items() if value is not None and value is not False}
        return Backward(self.recorder, self.recorder.backpropagate(self, given))

    def append(self, item: Any) -> None:
        """Append to a list that lives where the graph runs (``tracer.list()``)."""
        if self._settled:
            self.result().append(item)
        else:
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
        given = kwargs or {}
        values = args if len(args) == 1 and type(args[0]) is Value and not given else _values((args, given))
        for value in values:
            if value.saved is not None and value._settled:  # noqa: SLF001 - its own class
                return function(*_with_results(args), **_with_results(given))
        op, recorder = _op_of(function), values[0].recorder
        if given:
            if op in _DROPOUTS and given.get("training") is False:
                return args[0]
            given = {key: value for key, value in given.items() if not _is_default(key, value)}
        if op not in ALLOWED or (op in IN_PLACE and type(args[0]) is not Value):
            _refuse(op)
        return recorder.append(op, args, given, recorder.block)

    def __getattr__(self, name: str) -> Any:
        if name[0] == "_":
            raise AttributeError(name)
        if self.saved is not None and self._settled:
            return getattr(self.result(), name)
        if self.fake is not None and name in _FACTS and isinstance(self.fake, torch.Tensor):
            return getattr(self.fake, name)
        op = self.recorder.builder.nodes[self.node].op
        if name not in ATTRIBUTES and name not in FIELDS_OF.get(op, ()):
            if name in _METHODS:
                return functools.partial(self.recorder.record, _METHODS[name], self)
            if name not in FIELDS and hasattr(torch.Tensor, name):
                raise InvalidGraph(f"Tensor.{name} {why_refused(f'Tensor.{name}')}", where=str(users_line()))
            if name not in FIELDS and op in _POINTS:
                self._check_module(name)
        return self.recorder.append("attribute", (self, name), NO_KEYWORDS, self.recorder.block)

    def __getitem__(self, index: Any) -> Any:
        if self.saved is not None and self._settled:
            return self.result()[index]
        recorder = self.recorder
        return recorder.append("operator.getitem", (self, index), NO_KEYWORDS, recorder.block)

    def __setitem__(self, index: Any, new: Any) -> None:
        if self.saved is not None and self._settled:
            self.result()[index] = new
            return
        recorder = self.recorder
        recorder.append("operator.setitem", (self, index, new), NO_KEYWORDS, recorder.block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: what is called is a method that no tensor has."""
        if self._settled:
            return self.result()(*args, **kwargs)
        node = self.recorder.builder.nodes[self.node]
        if node.op != "attribute":
            raise InvalidInput("a value cannot be called", where=str(users_line()))
        near = difflib.get_close_matches(node.args[1], _METHODS, n=3, cutoff=0.6)
        raise InvalidInput(
            f"a tensor has no {node.args[1]!r}" + (f"; did you mean {', '.join(near)}?" if near else ""),
            where=str(users_line()),
        )

    def __repr__(self) -> str:
        if self._settled:
            return repr(self.recorder.outcome(self))
        node = self.recorder.builder.nodes[self.node]
        return f"<value of {node.op}, {node.source}>"

    def _check_module(self, name: str) -> None:
        """Refuse the way to a module below one that is named like a point (``bert.layer[0].output.dense``)."""
        node, trace = self.recorder.builder.nodes[self.node], trace_now.get()
        path, point = node.args[1], _POINTS[node.op]
        if trace is None or ":" in path:
            return
        named = dict(trace.model.tree.get_submodule(path).named_children()).get(point)
        if named is not None and name in dict(named.named_children()):
            whole = f"{path}.{point}".lstrip(".")
            raise InvalidInput(
                f"{whole} is a value of {path or 'the model'} here, and not the module of that name",
                where=str(users_line()),
                next=f"the module is model.get({whole!r}); rename={{…}} gives it another name",
            )

    def _now(
        self,
        what: str,
        next: str = "save the value and look at it after the block",
        why: str = "",
    ) -> NoReturn:
        raise InvalidInput(
            f"{what} of a value is not known while the block is recorded",
            where=str(users_line()),
            why=why or "the model has not run yet",
            next=next,
        )

    def _undecided(self, what: str, instead: str) -> NoReturn:
        """Refuse what a block that is rewritten records; with the reason why this is not."""
        found = why_unrecorded(users_frame())
        self._now(what, f"{found.instead}; or {instead}" if found.why else instead, found.why)

    def _known(self) -> Any:
        """What is known of it under scan; of a list that was filled since, or where it is not known how far, nothing."""
        return None if self.fake is None else self.recorder.shadow.value(self.node)

    def __bool__(self) -> bool:
        if self._settled:
            return bool(self.result())
        return self._undecided(
            "the truth", "write `with tracer.cond(value):`, and `.else_()` for what is to happen otherwise"
        )

    def __len__(self) -> int:
        if self._settled:
            return len(self.result())
        if isinstance(known := self._known(), torch.Tensor | tuple | list | dict):
            return len(known)
        return self._now("the length", "use value.shape[0], a value itself; in a trace with scan=True it is known")

    def __iter__(self) -> Iterator[Any]:
        if self._settled:
            return iter(self.result())
        count = len(known) if isinstance(known := self._known(), torch.Tensor | tuple | list) else _unpacked_into()
        if count is None:
            self._undecided(
                "the number of elements", "write `for item in session.iter(value):`; tracer.iter[…] loops over steps"
            )
        return iter([self[index] for index in range(count)])

    def __float__(self) -> float:
        return float(self.result()) if self._settled else self._now("the number")

    def __int__(self) -> int:
        return int(self.result()) if self._settled else self._now("the number")

    __index__ = __int__

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.result(), digits) if self._settled else self._now("the number")

    def __format__(self, spec: str) -> str:
        if self._settled:
            return format(self.result(), spec)
        return self._now("the text") if spec else repr(self)

    def __contains__(self, item: Any) -> bool:
        return item in self.result() if self._settled else self._now("the content")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.result().__array__(*args, **kwargs) if self._settled else self._now("the content")

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """For copies and pickles: those of the result."""
        return (copy.copy, (self.result(),)) if self._settled else self._now("the content")

    __hash__ = object.__hash__
    __array_ufunc__ = None  # so that `array / value` asks the value, and does not make an array of values


NO_KEYWORDS: Mapping[str, Any] = {}
_CONTAINERS = frozenset({LIST, DICT})
_DROPOUTS = frozenset(f"torch.{name}" for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"))
"""Functions that do nothing in evaluation, so that a module with a dropout in it can be recorded."""

_METHODS = {op.removeprefix("Tensor."): op for op in sorted(ALLOWED) if op.startswith("Tensor.")}
"""The methods of tensors that a graph may call, and their names in it."""
_POINTS = {op: kind for kind, op in READS.items()}

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


def _with_results(value: Any) -> Any:
    """The arguments of a torch function with results in the place of the values that have one."""
    if type(value) is Value:
        return value.result() if value._settled else value  # noqa: SLF001 - its own module
    if type(value) in (list, tuple):
        return type(value)(_with_results(item) for item in value)
    return {key: _with_results(item) for key, item in value.items()} if type(value) is dict else value


def _values(value: Any) -> list[Value]:
    """The values in a nested argument."""
    if type(value) is Value:
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [found for item in value for found in _values(item)]


def _refuse(op: str) -> NoReturn:
    """Raise the refusal of a torch function that a graph has not, or not on a tensor from outside of the block."""
    reason = why_refused(op)
    raise InvalidGraph(
        f"{op} {reason or 'on a tensor from outside of the block cannot be recorded: only values can be changed'}",
        where=str(users_line()),
        next="the allowed operations are listed in the documentation"
        if reason
        else "save the value, and assign after the block",
    )


def _binary(name: str, *, reflected: bool = False) -> Callable[[Value, Any], Any]:
    op, plain = f"operator.{name}", getattr(operator, name)

    def operate(self: Value, other: Any) -> Any:
        if self.saved is not None and self._settled:
            return plain(self.result(), other)
        recorder = self.recorder
        return recorder.append(op, (self, other), NO_KEYWORDS, recorder.block)

    def operate_reflected(self: Value, other: Any) -> Any:
        if self.saved is not None and self._settled:
            return plain(other, self.result())
        recorder = self.recorder
        return recorder.append(op, (other, self), NO_KEYWORDS, recorder.block)

    return operate_reflected if reflected else operate


def _unary(name: str) -> Callable[[Value], Any]:
    op, plain = f"operator.{name}", getattr(operator, name)
    return lambda self: plain(self.result()) if self._settled else self.recorder.record(op, self)


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
for _name in _BINARY:
    _plain = _name.rstrip("_")
    setattr(Value, f"__{_plain}__", _binary(_name))
    setattr(Value, f"__r{_plain}__", _binary(_name, reflected=True))
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
