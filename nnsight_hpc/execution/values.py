"""Saved values: kept during a run, sent as frames, and read again as plain Python and torch objects.

A result frame is ``{"format": "nnsight-hpc/values", "version": 1, "values": {name: value},
"absent": {name: why}}`` in the graph's JSON form for
arguments, where a tensor is named and lies in the safetensors block. A model's output (a dataclass of transformers)
becomes a `SavedOutput`, which answers to ``out["logits"]`` and ``out.logits``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from nnsight_hpc.graph.codec import dump_value, load_value
from nnsight_hpc.graph.nodes import Device, DType, TensorRef, map_leaves
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.frames import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Self

FORMAT = "nnsight-hpc/values"
VERSION = 1
_NAMED = "\0named"


@dataclass(frozen=True)
class Absent:
    """What is returned for a saved value that was never made, and in words why."""

    why: str


class NotReached(Absent):
    """Absent because the model did not come there, as it may: generation ended, a module was not called."""


class SavedOutput(dict[str, Any]):
    """A model's output by name, as a dict, by attribute, and by number, as transformers has it."""

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"this output has no {name!r}; it has {', '.join(self)}")


class SavedTuple(tuple[Any, ...]):  # noqa: SLOT001 - it has names beside its entries
    """A named tuple of torch (``x.topk(5)``): its entries by number and by name."""

    fields: tuple[str, ...]

    @classmethod
    def of(cls, fields: Iterable[str], entries: Iterable[Any]) -> Self:
        made = cls(entries)
        made.fields = tuple(fields)
        return made

    def __getattr__(self, name: str) -> Any:
        if name != "fields" and name in self.fields:
            return self[self.fields.index(name)]
        raise AttributeError(f"this tuple has no {name!r}; it has {', '.join(self.fields)}")


def kept(value: Any, *, copy: bool, detach: bool = True) -> Any:
    """A value as it is to be returned: copied where `copy` says so or a small view would hold large memory."""
    if isinstance(value, torch.Tensor):
        if not copy and value.untyped_storage().nbytes() <= 2 * value.numel() * value.element_size():
            return value.detach() if detach else value
        made = value.clone()
        return made.detach() if detach and made.requires_grad else made  # most have no history, and detach() takes time
    if isinstance(value, dict):
        return SavedOutput(
            {str(key): kept(item, copy=copy, detach=detach) for key, item in value.items() if _returnable(item)}
        )
    if fields := _fields_of(value):
        return SavedTuple.of(fields, (kept(item, copy=copy, detach=detach) for item in value))
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        items = [kept(item, copy=copy, detach=detach) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if not _returnable(value):
        raise TypeError(f"a value of type {type(value).__name__} cannot be saved")
    return value


def converted(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A saved value with every tensor in it changed, however it is nested."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, SavedOutput):
        return SavedOutput({key: converted(item, change) for key, item in value.items()})
    if isinstance(value, SavedTuple):
        return SavedTuple.of(value.fields, (converted(item, change) for item in value))
    return type(value)(converted(item, change) for item in value) if type(value) in (list, tuple) else value


def _fields_of(value: Any) -> tuple[str, ...]:
    """The names of the entries of a named tuple of torch, or of one that was saved; of anything else none."""
    if isinstance(value, SavedTuple):
        return value.fields
    if type(value).__module__ != "torch.return_types":
        return ()
    return tuple(name for name in type(value).__match_args__)


def _returnable(value: Any) -> bool:
    plain = (
        torch.Tensor,
        torch.Size,
        torch.dtype,
        torch.device,
        bool,
        int,
        float,
        complex,
        str,
        range,
        Absent,
        type(None),
        dict,
        list,
        tuple,
    )
    return isinstance(value, plain)


def pack_values(values: Mapping[str, Any]) -> bytes:
    """Saved values by name as one result frame; tensors are copied to the CPU."""
    tensors: dict[str, torch.Tensor] = {}
    absent = {name: value.why for name, value in values.items() if isinstance(value, Absent)}
    made = {name: dump_value(_without_tensors(values[name], tensors)) for name in values if name not in absent}
    document = {"format": FORMAT, "version": VERSION, "values": made, "absent": absent}
    header = json.dumps(document, allow_nan=False).encode()
    return pack(header, save_tensors(tensors))


def unpack_values(frame: bytes | memoryview) -> dict[str, Any]:
    """The values of a result frame by name: tensors on the CPU, outputs as `SavedOutput`."""
    header, block = unpack(frame)
    document = json.loads(header)
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        raise InvalidInput("not a result of nnsight-hpc", why=f"its format is {document.get('format')!r}")
    tensors = load_tensors(block)
    made = {
        name: _outputs(map_leaves(load_value(value, name, 0), lambda leaf: _torch_leaf(leaf, tensors)))
        for name, value in document["values"].items()
    }
    return made | {name: Absent(why) for name, why in document.get("absent", {}).items()}


def save_tensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors by name as a safetensors file; of tensors that share memory each is written."""
    block: bytes = save_safetensors(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    )
    return block


def load_tensors(block: bytes | memoryview) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name; raises `InvalidInput` when it is none."""
    if not len(block):
        return {}
    try:
        tensors: dict[str, torch.Tensor] = load_safetensors(bytes(block))
    except Exception as error:  # noqa: BLE001 - safetensors raises a type of its own that it does not export
        raise InvalidInput("the tensors are not a valid safetensors file", why=str(error)) from None
    return tensors


def _without_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    def leaf(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            name = f"t{len(tensors)}"
            tensors[name] = item
            return TensorRef(name)
        if isinstance(item, torch.dtype):
            return DType(str(item).removeprefix("torch."))
        return Device(str(item)) if isinstance(item, torch.device) else item

    return map_leaves(_unnamed(value), leaf)


def _unnamed(value: Any) -> Any:
    """The same nesting with dicts of one key for named tuples: a graph's JSON has none."""
    if isinstance(value, dict):
        return {key: _unnamed(item) for key, item in value.items()}
    if not isinstance(value, list | tuple) or isinstance(value, torch.Size):
        return value
    items = [_unnamed(item) for item in value]
    if fields := _fields_of(value):
        return {_NAMED: [list(fields), items]}
    return items if isinstance(value, list) else tuple(items)


def _torch_leaf(leaf: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(leaf, TensorRef):
        return tensors[leaf.name]
    if isinstance(leaf, DType):
        return getattr(torch, leaf.name)
    return torch.device(leaf.name) if isinstance(leaf, Device) else leaf


def _outputs(value: Any) -> Any:
    if isinstance(value, dict) and _NAMED in value:
        fields, items = value[_NAMED]
        return SavedTuple.of(fields, map(_outputs, items))
    if isinstance(value, dict):
        return SavedOutput({key: _outputs(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_outputs(item) for item in value)
    return value
