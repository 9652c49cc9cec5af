"""Fake tensors as the checks use them: what they note, what they are compared by, and what stands for the unknown."""

from __future__ import annotations

import functools
import logging
import math
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

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
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

UNKNOWABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    NotImplementedError,
    AssertionError,
)
"""What a fake run raises where the result depends on data, or where torch has no fake form of an operation."""
SMALL = 1 << 20
"""Elements up to which an operation is tried on real zeros, where its fake form is not enough."""
_ITEM = torch.ops.aten._local_scalar_dense.default  # noqa: SLF001 - its name in torch
_SEEDED = torch.Tag.nondeterministic_seeded
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


class Known(NamedTuple):
    """The value of a fake tensor of one element.

    Attributes
    ----------
    writes
        How many writes the mode had seen when this was known; it may be stale after another.
    given
        Whether it comes from what differs from request to request.
    """

    value: torch.Tensor
    writes: int
    given: bool


class Mode(FakeTensorMode):  # type: ignore[misc] # torch is not type-checked
    """Fake tensors that note how large they get on the way to a result, and can be made to answer questions.

    Of tensors of one element the value is known where it follows from constants, since it may be a size. torch has that, too
    (`FakeTensor.constant`), but computes what follows from constants for real, however large it is.

    Attributes
    ----------
    largest
        Bytes of the most that one operation of ATen made since it was last set to 0; views make nothing.
    answers
        Whether a question for data (``if mask.all():``) is answered by no or 0. A generation asks whether it has ended.
    given
        Whether questions for values that a request has brought are answered.
    asked
        Whether such a question was answered since this was last set to False.
    follow
        Told of the tensors that each operation used and made, if it is there.
    """

    largest = 0
    answers = False
    given = True
    asked = False
    follow: Callable[[Iterable[torch.Tensor], Iterable[torch.Tensor]], None] | None = None
    _writes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        fakes = [leaf for leaf in leaves if type(leaf) is FakeTensor]
        known = [self._known(tensor) for tensor in fakes]
        if func is _ITEM:
            if known and known[0] is not None:
                self.asked = self.asked or known[0].given
                return known[0].value.item()
            if self.answers:
                return False if args[0].dtype == torch.bool else 0
        # For want of a fake form torch would run the real operation, on zeros.
        self.allow_fallback_kernels = size_of(leaves) <= SMALL
        result = super().__torch_dispatch__(func, types, args, kwargs)
        made = [leaf for leaf in tree_leaves(result) if type(leaf) is FakeTensor]
        if self.follow is not None:
            self.follow(fakes, made)
        if not _is_view(func):
            self.largest = max(self.largest, sum(t.numel() * t.element_size() for t in made))
        self._deduce(func, (args, kwargs or {}), {id(t): k for t, k in zip(fakes, known, strict=True)}, made)
        return result

    def know(self, fake: torch.Tensor, value: torch.Tensor, *, given: bool = True) -> None:
        """Note the value of a fake tensor of one element."""
        fake.known = Known(value, self._writes, given)

    def _known(self, fake: Any) -> Known | None:
        known: Known | None = getattr(fake, "known", None)
        stale = known is None or known.writes != self._writes or (known.given and not self.given)
        return None if stale else known

    def _deduce(self, func: Any, given: Any, known: Mapping[int, Known | None], made: list[Any]) -> None:
        """Compute what follows from known values, where that is one element, too."""
        for tensor in made:
            if tensor.constant is not None:  # what `torch.tensor` has made of a number
                self.know(tensor, tensor.constant, given=False)
                tensor.constant = None
        values = [value for value in known.values() if value is not None]
        if func._schema.is_mutable:  # noqa: SLF001 - its one description
            self._writes += self.given  # a view of a known value may be written into that is not known itself
        elif (
            values
            and made
            and len(values) == len(known)
            and all(t.numel() == 1 for t in made)
            and _SEEDED not in func.tags
        ):
            args, kwargs = tree_map_only(FakeTensor, lambda t: known[id(t)].value, given)  # type: ignore[union-attr]
            with no_dispatch():
                results = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
            for tensor, value in zip(made, results, strict=True):
                self.know(tensor, value, given=any(each.given for each in values))


def size_of(arguments: list[Any]) -> float:
    """A number that what an operation makes of its arguments does not exceed by much: the product of all that is a size."""
    numels = (max(leaf.numel(), 1) for leaf in arguments if isinstance(leaf, torch.Tensor))
    numbers = (abs(leaf) for leaf in arguments if isinstance(leaf, int | float) and abs(leaf) > 1)
    return math.prod([*numels, *numbers], start=1.0)


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
    return any(leaf is UNKNOWN for leaf in objects_of(value))


_NUMBERS = frozenset({int, float, bool, complex, str, type(None)})


def objects_of(value: Any) -> Iterator[Any]:
    """The leaves of a nested value that are no plain numbers or text. (A list may have a million of those.)"""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list | tuple | dict):
            inner = one.values() if isinstance(one, dict) else one
            if not _NUMBERS.issuperset(map(type, inner)):
                waiting += inner
        elif type(one) not in _NUMBERS:
            yield one


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
