"""What a request may leave in a resident model and in torch, beside the weights: put back as it was.

transformers' dynamic RoPE replaces a buffer by one for longer prompts, its long RoPE writes one at each forward,
`output_hidden_states` leaves capturing hooks on every layer (and with them the next request would see hidden states from before
its changes), a forward may set attributes. The next request must give, bit for bit, what it would have given as the first.
"""

from __future__ import annotations

import enum
import logging
import random
import types
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnsight_hpc.execution.memory import is_spread, local

if TYPE_CHECKING:
    from collections.abc import Callable

_LEFT_ALONE = (
    *(torch.Tensor, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, enum.Enum),
    *(str, bytes, int, float, type(None), torch.dtype, torch.device, tuple),
)
"""What holds no state of a model, or cannot be changed: of tensors, that they are the same ones is looked at."""
_TABLES = (dict, list, set)
_SMALL = 1 << 20
"""Bytes up to which the content of a tensor that is no parameter is kept."""
logger = logging.getLogger(__name__)


class Resident:
    """A model and its process as they are now.

    Parameters
    ----------
    module
        The model; it has run once, so that what is made at the first forward is there. For use in the thread that runs it.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._tables = _tables_of(module)
        self._copies = [table.copy() for table in self._tables]
        self._sizes = [*map(len, self._tables)]
        full = [table for table in self._tables if table]
        self._views = [
            *full,
            *(table.values() for table in full if isinstance(table, dict)),
        ]  # they show what is there now
        self._entries = [*chain.from_iterable(self._views)]
        self._settings = [get() for get, _ in _SETTINGS]
        tensors = {id(entry): entry for entry in self._entries if isinstance(entry, torch.Tensor)}
        parts = {key: local(tensor) for key, tensor in tensors.items()}
        self._contents = {id(parts[key]): parts[key].detach().clone() for key in tensors if _is_copied(tensors[key])}
        self._tensors, self._marks = [*parts.values()], [*map(_mark, parts.values())]
        self._spread = [tensor for tensor in tensors.values() if is_spread(tensor)]
        self._versions = [*map(_version, self._spread)]

    def restore(self) -> bool:
        """Put back what has changed since then; whether that could be done: weights, and what else is large, are not put back.

        Where nothing has changed it takes about a microsecond for each module.
        """
        if not self._as_before():
            for table, copy in zip(self._tables, self._copies, strict=True):
                _restore(table, copy)
        for before, (get, set_) in zip(self._settings, _SETTINGS, strict=True):
            if not _same(get(), before):
                set_(before)
        if [*map(_version, self._spread)] != self._versions:
            return False
        return [*map(_mark, self._tensors)] == self._marks or all([*map(self._restore, range(len(self._tensors)))])

    def _restore(self, number: int) -> bool:
        """Put back the content of a tensor that was written into; whether it is as before."""
        tensor, mark = self._tensors[number], self._marks[number]
        content = self._contents.get(id(tensor))
        if _mark(tensor) == mark:
            return True
        if content is None or _mark(tensor)[0] != mark[0]:
            return False
        with torch.no_grad():
            tensor.copy_(content)
        self._marks[number] = _mark(tensor)
        return True

    def _as_before(self) -> bool:
        try:  # what is the very same object is not compared further, so that this takes 5 ns for each
            return [*map(len, self._tables)] == self._sizes and [*chain.from_iterable(self._views)] == self._entries
        except (RuntimeError, ValueError, TypeError):  # another tensor: whether that is equal is no yes or no
            return False


def _mark(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor lies, and how often it was written into."""
    return tensor.data_ptr(), tensor._version  # noqa: SLF001 - its one counter


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written into. Of one that is spread over processes its part here does not count that."""
    return int(tensor._version)  # noqa: SLF001 - as in _mark


def _is_copied(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, torch.nn.Parameter) and tensor.numel() * tensor.element_size() <= _SMALL


def _tables_of(module: torch.nn.Module) -> list[Any]:
    """The dicts, lists and sets that a model's modules and what they hold (configurations) are made of."""
    waiting: list[Any] = [module]
    tables: dict[int, Any] = {}
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, _LEFT_ALONE) or _is_distributed(one):
            continue
        seen.add(id(one))
        table = one if isinstance(one, _TABLES) else getattr(one, "__dict__", None)
        if isinstance(table, _TABLES):
            tables[id(table)] = table
            waiting += table.values() if isinstance(table, dict) else table
    return [*tables.values()]


def _is_distributed(one: Any) -> bool:
    """Whether an object belongs to torch's process groups and meshes, which a spread module has, and which go on meanwhile."""
    return any(base.__module__.startswith(("torch.distributed", "torch._C._distributed")) for base in type(one).__mro__)


def _restore(table: Any, copy: Any) -> None:
    same = len(table) == len(copy) and all(map(is_, table, copy))
    if same and not (isinstance(table, dict) and any(table[key] is not copy[key] for key in copy)):
        return
    logger.debug("a request has left something in %s", type(table).__name__)
    if isinstance(table, list):
        table[:] = copy
    else:
        table.clear()
        table.update(copy)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return bool(torch.equal(a, b))
    return all(map(_same, a, b)) if isinstance(a, list) else bool(a == b)


def _cuda_seeds() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _autocast() -> list[bool]:
    return [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]


def _set_autocast(enabled: list[bool]) -> None:
    for device, on in zip(("cpu", "cuda"), enabled, strict=True):
        torch.set_autocast_enabled(device, on)


def _numpy_seed() -> tuple[Any, ...]:
    name, keys, *rest = tuple(np.random.get_state())  # noqa: NPY002 - what a model draws from, if it draws by NumPy
    return name, np.asarray(keys).tobytes(), *rest


def _set_numpy_seed(state: tuple[Any, ...]) -> None:
    name, keys, *rest = state
    np.random.set_state((name, np.frombuffer(keys, dtype=np.uint32), *rest))  # noqa: NPY002


_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_rng_state, torch.set_rng_state),
    (_cuda_seeds, torch.cuda.set_rng_state_all),
    (_numpy_seed, _set_numpy_seed),
    (random.getstate, random.setstate),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (_autocast, _set_autocast),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (lambda: torch.backends.cudnn.benchmark, lambda on: setattr(torch.backends.cudnn, "benchmark", on)),
    (lambda: torch.backends.cudnn.deterministic, lambda on: setattr(torch.backends.cudnn, "deterministic", on)),
)
"""What torch and the generators of the process keep for all, and how it is set."""
