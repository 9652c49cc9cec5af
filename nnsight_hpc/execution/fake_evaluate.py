"""One allowed operation on fake tensors and plain values: what it gives, or the error that a run would raise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from nnsight_hpc.execution.fake_limits import check_parts
from nnsight_hpc.execution.fake_tensors import SMALL, UNKNOWABLE, UNKNOWN, is_unknown, size_of
from nnsight_hpc.execution.resolve import carry_out
from nnsight_hpc.graph.operations import IN_PLACE

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.execution.fake_model import Twin

_ALL_DATA = frozenset({"Tensor.tolist"})
"""What gives data and nothing else. (Fake tensors would make a list of a billion unknown numbers before they say so.)"""
_TAKES_A_PART = frozenset({"operator.getitem", "attribute"})
_kernels: dict[tuple[str, tuple[torch.dtype, ...]], str] = {}
"""Of an operation and dtypes why there is no kernel; empty where there is one, or it is not known."""


def evaluate(twin: Twin, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `op` gives; `UNKNOWN` when that depends on data.

    Raises what the operation would raise on such arguments.
    """
    unknown = any(arg is UNKNOWN for arg in args) if op in _TAKES_A_PART else is_unknown((args, kwargs))
    if unknown or op in _ALL_DATA:
        return args[0] if op in IN_PLACE else UNKNOWN
    check_parts(op, args, kwargs)
    try:
        with twin.active():
            result = carry_out(op, args, kwargs, twin.device)
    except UNKNOWABLE:
        return args[0] if op in IN_PLACE else UNKNOWN
    except Exception as error:  # noqa: BLE001 - whatever it is, it is looked into
        return _confirmed(twin, error, op, args, kwargs)
    _check_kernel(op, args, kwargs)
    return result


def _check_kernel(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `NotImplementedError` where torch has no CPU kernel of `op` for such dtypes, which fakes do not know.

    It is tried once for each operation and dtypes, on zeros of the same dimensions but at most two long.
    """
    tensors = _fakes((args, kwargs))
    key = op, tuple(t.dtype for t in tensors)
    if key not in _kernels:
        _kernels[key] = _missing_kernel(op, args, kwargs, tensors)
    if reason := _kernels[key]:
        raise NotImplementedError(reason)


def _missing_kernel(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[FakeTensor]) -> str:
    plain = [leaf for leaf in tree_leaves((args, kwargs)) if not isinstance(leaf, torch.Tensor)]
    if not tensors or any(t.device.type != "cpu" for t in tensors) or size_of(plain) > SMALL:
        return ""
    try:
        _on_zeros(op, args, kwargs, lambda shape: [min(length, 2) for length in shape])
    except NotImplementedError as error:
        return str(error)
    except Exception:  # noqa: BLE001 - the shapes are not the true ones, so that other errors mean nothing
        return ""
    return ""


def _confirmed(twin: Twin, error: Exception, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Try an operation that failed on fakes on small real zeros: torch's fake forms have faults, and other messages.

    Raises the error of the real operation if it has one, or else gives the fake form of its result. Where the tensors are not
    small, or not on one device, the fake form is believed.
    """
    tensors = _fakes((args, kwargs))
    if len({t.device for t in tensors}) > 1 or size_of(tree_leaves((args, kwargs))) > SMALL:
        raise error
    try:
        result = _on_zeros(op, args, kwargs, list)
    except torch.linalg.LinAlgError:  # zeros have no inverse; the shapes were right
        return UNKNOWN
    device = tensors[0].device if tensors else twin.device
    return tree_map_only(torch.Tensor, lambda t: twin.fake_like(t, device), result)


def _on_zeros(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], sized: Callable[[torch.Size], list[int]]) -> Any:
    zeros = {id(t): torch.zeros(sized(t.shape), dtype=t.dtype) for t in _fakes((args, kwargs))}
    real_args, real_kwargs = tree_map_only(FakeTensor, lambda t: zeros[id(t)], (args, kwargs))
    with torch.no_grad():
        return carry_out(op, real_args, real_kwargs, torch.device("cpu"))


def _fakes(value: Any) -> list[FakeTensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, FakeTensor)]
