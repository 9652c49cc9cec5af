"""From the name of an allowed operation to what carries it out. Nothing that is not listed is ever looked up."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.plain import BOUNDED, MAX_ENTRIES, bounded, get_item, set_item, within
from nnsight_hpc.graph.nodes import Device, DType, Seed
from nnsight_hpc.graph.operations import ALLOWED, ATTRIBUTES, FIELDS, PROTOCOL, RANDOM, why_no_attribute

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

_NAMESPACES: dict[str, Any] = {
    "torch": torch,
    "torch.nn.functional": torch.nn.functional,
    "torch.linalg": torch.linalg,
    "torch.fft": torch.fft,
    "torch.special": torch.special,
    "operator": operator,
}
_MOVES = frozenset({"Tensor.to", "Tensor.cuda"})
_OF_DATA = frozenset({"torch.tensor", "torch.as_tensor"})
FACTORIES = _OF_DATA | {
    f"torch.{name}"
    for name in (
        *(
            "arange",
            "eye",
            "full",
            "linspace",
            "logspace",
            "ones",
            "scalar_tensor",
            "tril_indices",
            "triu_indices",
            "zeros",
        ),
        *(f"{window}_window" for window in ("bartlett", "blackman", "hamming", "hann", "kaiser")),
        *("fft.fftfreq", "fft.rfftfreq"),
    )
}
"""Operations that make tensors of numbers: torch puts them on the CPU where no device is named."""


def carry_out(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], own: torch.device) -> Any:
    """Run `op`, a listed operation that is not of the protocol itself, on values.

    Every device but ``cpu`` means `own`, the model's, also where it is named by a string or a number, and where none is named
    for a new tensor. Seeds become generators where the numbers are drawn.
    """
    if op in _MOVES:
        op, args = "Tensor.to", _moved(op, args, own)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": _device(kwargs["device"], own)}
    elif op in FACTORIES and not (op in _OF_DATA and args and isinstance(args[0], torch.Tensor)):
        kwargs = {**kwargs, "device": own}
    if op in RANDOM:
        kwargs = _seeded(op, args, kwargs, own)
    return function_of(op)(*args, **kwargs)


def names_a_device(op: str, kwargs: Collection[str]) -> bool:
    """Whether `carry_out` does more for an operation with these keywords than to call `function_of` it."""
    return op in _MOVES or op in RANDOM or op in FACTORIES or "device" in kwargs


@functools.cache
def function_of(op: str) -> Callable[..., Any]:
    """What carries out `op`, a name on the list that is not of the protocol itself."""
    if op not in ALLOWED or (op in PROTOCOL and op != "attribute"):
        raise KeyError(op)
    if op in _OWN:
        return _OWN[op]
    namespace, _, name = op.rpartition(".")
    if namespace == "Tensor":
        return _method(name)
    if namespace == "operator" and name in BOUNDED:
        return bounded(name)
    if namespace == "einops":
        import einops  # noqa: PLC0415 - an optional dependency of torch users

        return getattr(einops, name)  # type: ignore[no-any-return]
    return getattr(_NAMESPACES[namespace], name)  # type: ignore[no-any-return]


def attribute(value: Any, name: str) -> Any:
    """A listed attribute of a tensor, a field of a model's output (a mapping) or of a named tuple of torch."""
    why = ""
    if isinstance(value, torch.Tensor):
        known, why = ATTRIBUTES, why_no_attribute(name)
    elif type(value).__module__ == "torch.return_types":
        known = frozenset(field for field in FIELDS if hasattr(value, field))
    else:
        known = frozenset(map(str, value)) if isinstance(value, dict) else frozenset()
    if name not in known:
        have = f"; it has {', '.join(sorted(known))}" if known else ""
        raise AttributeError(f"a value of type {type(value).__name__} has no {name!r} here{why and f': {why}'}{have}")
    return value[name] if isinstance(value, dict) else getattr(value, name)


def constant(leaf: Any, device: torch.device) -> Any:
    """A constant of a graph as torch wants it. Every device but ``cpu`` means the model's own."""
    if isinstance(leaf, DType):
        return getattr(torch, leaf.name)
    if isinstance(leaf, Device):
        return torch.device("cpu") if leaf.name == "cpu" else device
    return _generator(leaf.number, device) if isinstance(leaf, Seed) else leaf


def _method(name: str) -> Callable[..., Any]:
    def call(value: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}() is a method of tensors, and the value is of type {type(value).__name__}")
        return getattr(value, name)(*args, **kwargs)

    return call


def _type(value: Any, dtype: Any) -> Any:
    """``x.type(torch.float16)``; torch would take the name of a class, too."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"type() takes a dtype here, such as torch.float32, not {type(dtype).__name__}")
    return _method("to")(value, dtype)


def _reduce(value: Any, pattern: str, reduction: str, **lengths: Any) -> Any:
    """``einops.reduce``, which would call a Python function, too."""
    import einops  # noqa: PLC0415

    if not isinstance(reduction, str):
        raise TypeError(f"the reduction of einops.reduce is a name such as 'mean' here, not {type(reduction).__name__}")
    return einops.reduce(value, pattern, reduction, **lengths)


def _tolist(value: Any) -> Any:
    """``x.tolist()``; a tensor that was expanded has many more elements than memory."""
    if isinstance(value, torch.Tensor) and value.numel() > MAX_ENTRIES:
        raise ValueError(f"a list of {value.numel()} numbers; the limit is {MAX_ENTRIES}")
    return _method("tolist")(value)


def _in_pieces(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which cuts a tensor, limited in how many pieces it makes: each is an object, however small."""

    def call(value: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(value, torch.Tensor):
            where = args[0] if args else next((given for key, given in kwargs.items() if key != "dim"), None)
            most = _pieces(name, max(value.shape, default=0), where)
            if most > MAX_ENTRIES:
                raise ValueError(f"{most} pieces of a tensor; the limit is {MAX_ENTRIES}")
        return function(value, *args, **kwargs)

    return call


def _pieces(name: str, longest: int, where: Any) -> int:
    """Into how many pieces a tensor is cut: `where` is their length, their number, or where each ends."""
    if name == "unbind":
        return longest
    if isinstance(where, list | tuple):
        return len(where) + 1
    if isinstance(where, torch.Tensor) and where.ndim:
        return int(where.numel()) + 1
    number = int(where) if isinstance(where, int | torch.Tensor) else 1
    return longest // max(1, number) if name == "split" else number


_CUTTING = ("unbind", "split", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit")


def _divided(name: str, divide: Callable[..., Any]) -> Callable[..., Any]:
    """A division that does not end the process: the CPU traps where the smallest integer is divided by -1."""

    def call(value: Any, other: Any, /, **options: Any) -> Any:
        whole = isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())
        if whole and options.get("rounding_mode") == "trunc" and bool((torch.as_tensor(other) == -1).any()):
            raise ValueError(f"{name} of integers by -1 with rounding_mode='trunc': use -x")
        return divide(value, other, **options)

    return call


def _power(power: Callable[..., Any]) -> Callable[..., Any]:
    def call(value: Any, exponent: int, /) -> Any:
        if not isinstance(exponent, int) or abs(exponent) > _MOST_FACTORS:
            raise ValueError(f"the exponent of a matrix power is an integer up to {_MOST_FACTORS} here")
        return power(value, exponent)

    return call


_DIVISIONS = ("div", "divide")
_MOST_FACTORS = 1_000_000
_OWN: dict[str, Callable[..., Any]] = {
    "attribute": attribute,
    "operator.getitem": get_item,
    "operator.setitem": set_item,
    "Tensor.type": _type,
    "Tensor.tolist": _tolist,
    "einops.reduce": _reduce,
    "torch.matrix_power": _power(torch.matrix_power),
    "torch.linalg.matrix_power": _power(torch.linalg.matrix_power),
    "Tensor.matrix_power": _power(_method("matrix_power")),
    **{f"torch.{name}": _divided(name, getattr(torch, name)) for name in _DIVISIONS},
    **{f"Tensor.{name}{end}": _divided(name, _method(name + end)) for name in _DIVISIONS for end in ("", "_")},
    "torch.tensor": lambda numbers, **kwargs: torch.tensor(within(numbers), **kwargs),
    "torch.as_tensor": lambda numbers, **kwargs: torch.as_tensor(within(numbers), **kwargs),
    "Tensor.new_tensor": lambda value, numbers, **kwargs: _method("new_tensor")(value, within(numbers), **kwargs),
    **{f"torch.{name}": _in_pieces(name, getattr(torch, name)) for name in _CUTTING},
    **{f"Tensor.{name}": _in_pieces(name, _method(name)) for name in _CUTTING},
}


def _moved(op: str, args: tuple[Any, ...], own: torch.device) -> tuple[Any, ...]:
    """The arguments of ``to``, by which ``cuda()`` is expressed, too."""
    if op == "Tensor.cuda":
        return (args[0], own)
    return (args[0], _device(args[1], own), *args[2:]) if len(args) > 1 else args


def _device(named: Any, own: torch.device) -> Any:
    """A device by its name or number; anything else (a dtype, a tensor, a device of a value) stays."""
    if isinstance(named, str):
        return torch.device("cpu") if torch.device(named).type == "cpu" else own
    return own if isinstance(named, int) and not isinstance(named, bool) else named


def _seeded(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], own: torch.device) -> dict[str, Any]:
    """The keywords of a random operation with the generator on the device of what it draws: by default, the model's."""
    like = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
    device = kwargs.get("device") or (own if like is None else like.device)
    generator = kwargs["generator"]
    if generator.device != device:
        generator = _generator(generator.initial_seed(), device)
    factory = like is None and op.startswith("torch.")
    return {**kwargs, "generator": generator, **({"device": device} if factory else {})}


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)
