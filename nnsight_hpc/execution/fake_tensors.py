"""Fake tensors as the checks use them: what they note, what they are compared by, and what stands for the unknown."""

from __future__ import annotations

import functools
import logging
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

UNKNOWABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    NotImplementedError,
    AssertionError,
)
"""What a fake run raises where the result depends on data, or where torch has no fake form of an operation."""
quiet = threading.local()
"""Has `on` set while errors of fake operations are ours to tell: torch would log each with its frames."""
logging.getLogger("torch._subclasses.fake_tensor").addFilter(lambda _record: not getattr(quiet, "on", False))


class Unknown:
    """The type of `UNKNOWN`: what cannot be known before the data is there. It is false."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "UNKNOWN"


UNKNOWN = Unknown()


class Mode(FakeTensorMode):  # type: ignore[misc] # torch is not type-checked
    """Fake tensors that note how large they get on the way to a result, and can be made to answer questions.

    Attributes
    ----------
    largest
        Bytes of the most that one operation of ATen made since it was last set to 0; views make nothing.
    answers
        Whether a question for data (``if mask.all():``) is answered by no or 0. A generation asks whether it has ended.
    """

    largest = 0
    answers = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.answers and func is torch.ops.aten._local_scalar_dense.default:  # noqa: SLF001 - its name in torch
            return False if args[0].dtype == torch.bool else 0
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not _is_view(func):
            made = sum(t.numel() * t.element_size() for t in tree_leaves(result) if type(t) is FakeTensor)
            self.largest = max(self.largest, made)
        return result


@functools.cache
def _is_view(operation: Any) -> bool:
    """Whether an operation of ATen returns memory that it was given."""
    return any(returned.alias_info is not None for returned in operation._schema.returns)  # noqa: SLF001 - its one description


class Copying(TorchFunctionMode):  # type: ignore[misc] # as above
    """While it lasts, `copy.deepcopy` makes of each tensor a fake one."""

    def __init__(self, fake: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._fake = fake

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - as torch's own FakeCopyMode
            if func is torch._C.TensorBase.clone:  # noqa: SLF001 - how a Parameter copies its data
                return self._fake(args[0])
            if func is torch.Tensor.__deepcopy__:
                tensor, memo = args
                if id(tensor) not in memo:
                    memo[id(tensor)] = self._fake(tensor)
                return memo[id(tensor)]
            return func(*args, **(kwargs or {}))


def described(value: Any) -> Any:
    """A key for a nested value: of tensors shape, strides, dtype and device, of all else what it is."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, dict):
        return type(value), tuple((key, described(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(described(item) for item in value)
    return type(value), repr(value)


def is_unknown(value: Any) -> bool:
    """Whether anything in a nested value is `UNKNOWN`."""
    return value is UNKNOWN or any(leaf is UNKNOWN for leaf in tree_leaves(value))


def alike(a: Any, b: Any) -> bool:
    """Whether two nested values have the same form: their tensors shape and dtype, all else being equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return bool(a.shape == b.shape and a.dtype == b.dtype)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return type(a) is type(b) and bool(a == b)


def fresh(value: Any) -> Any:
    """The same nested value in containers of its own, so that a change to one does not reach what is kept."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor, value)
