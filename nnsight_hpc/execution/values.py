"""Saved values: kept during a run, sent as frames, and read again as plain Python and torch objects.

A result frame is ``{"format": "nnsight-hpc/values", "version": 1, "values": {name: value}}`` in the graph's JSON form for
arguments, where a tensor is named and lies in the safetensors block. A model's output (a dataclass of transformers)
becomes a `SavedOutput`, which answers to ``out["logits"]`` and ``out.logits``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from nnsight_hpc.graph.codec import dump_value, load_value
from nnsight_hpc.graph.nodes import Device, DType, TensorRef, map_leaves
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.frames import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = "nnsight-hpc/values"
VERSION = 1


class SavedOutput(dict[str, Any]):
    """A model's output by name, as a dict and by attribute."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"this output has no {name!r}; it has {', '.join(self)}")


def kept(value: Any, *, copy: bool) -> Any:
    """A value as it is to be returned: detached, and copied where `copy` says so or a small view would hold large memory."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        view_of_more = value.untyped_storage().nbytes() > 2 * value.numel() * value.element_size()
        return value.clone() if copy or view_of_more else value
    if isinstance(value, dict):
        return SavedOutput({str(key): kept(item, copy=copy) for key, item in value.items() if _returnable(item)})
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        items = [kept(item, copy=copy) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if not _returnable(value):
        raise TypeError(f"a value of type {type(value).__name__} cannot be saved")
    return value


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
        type(None),
        dict,
        list,
        tuple,
    )
    return isinstance(value, plain)


def pack_values(values: Mapping[str, Any]) -> bytes:
    """Saved values by name as one result frame; tensors are copied to the CPU."""
    tensors: dict[str, torch.Tensor] = {}
    encoded = {name: dump_value(_without_tensors(value, tensors)) for name, value in values.items()}
    header = json.dumps({"format": FORMAT, "version": VERSION, "values": encoded}, allow_nan=False).encode()
    return pack(header, save_tensors(tensors))


def unpack_values(frame: bytes | memoryview) -> dict[str, Any]:
    """The values of a result frame by name: tensors on the CPU, outputs as `SavedOutput`."""
    header, block = unpack(frame)
    document = json.loads(header)
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        raise InvalidInput("not a result of nnsight-hpc", why=f"its format is {document.get('format')!r}")
    tensors = load_tensors(block)
    return {
        name: _outputs(map_leaves(load_value(value, name, 0), lambda leaf: _torch_leaf(leaf, tensors)))
        for name, value in document["values"].items()
    }


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

    return map_leaves(value, leaf)


def _torch_leaf(leaf: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(leaf, TensorRef):
        return tensors[leaf.name]
    if isinstance(leaf, DType):
        return getattr(torch, leaf.name)
    return torch.device(leaf.name) if isinstance(leaf, Device) else leaf


def _outputs(value: Any) -> Any:
    if isinstance(value, dict):
        return SavedOutput({key: _outputs(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_outputs(item) for item in value)
    return value
