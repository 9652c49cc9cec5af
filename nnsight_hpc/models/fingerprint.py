"""Short names for a model's weights: equal for two copies of them, different for any fine-tune.

They are made of the first and last 4 KiB of every tensor, so they cost milliseconds, also for a model of hundreds of
gigabytes. An edit that leaves both ends of every tensor untouched is not seen; for a proof of every byte there are the
checksums of the files' origin.

`fingerprint` is that of a model's folder, and goes by its files. `fingerprint_of_tensors` and `fingerprint_of_module` are
equal for the weights of a module and for the file that they were saved to, in however many parts, and whichever of the
names of a shared weight was saved: they go by the tensors alone, and begin with ``tensors-``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from nnsight_hpc.wire.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_SAMPLE = 4096
_OF_TENSORS = "tensors-"


def fingerprint(folder: str | Path) -> str:
    """The fingerprint of the model in `folder`: 32 hexadecimal digits over its safetensors files.

    Raises
    ------
    NotFound
        There are no safetensors files in the folder.
    InvalidInput
        One of them has no readable header.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise NotFound(
            f"there are no safetensors files in {folder}",
            next="save the model with save_pretrained(…); pickles are not read",
        )
    digest = hashlib.sha256()
    for file in files:
        _add_file(digest, file)
    return digest.hexdigest()[:32]


def fingerprint_of_tensors(files: Sequence[Path]) -> str:
    """The fingerprint of the weights in safetensors files; raises `InvalidInput` for one that cannot be read."""
    found: set[bytes] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {_sampled(tensors.get_tensor(name)) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InvalidInput(f"{file} is not a safetensors file", why=str(error)) from None
    return _of(found)


def fingerprint_of_module(module: torch.nn.Module) -> str:
    """The same of a module in memory: its parameters and persistent buffers; empty for one without, or on the meta device."""
    tensors = [tensor for tensor in module.state_dict().values() if isinstance(tensor, torch.Tensor)]
    if not tensors or any(tensor.is_meta for tensor in tensors):
        return ""
    return _of(map(_sampled, tensors))


def _of(samples: Iterable[bytes]) -> str:
    return _OF_TENSORS + hashlib.sha256(b"".join(sorted(set(samples)))).hexdigest()[:32]


def _sampled(tensor: torch.Tensor) -> bytes:
    """A digest of a tensor's dtype, shape and both ends."""
    flat, count = tensor.detach().reshape(-1), _SAMPLE // tensor.element_size()
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    for end in (flat[:count], flat[max(0, len(flat) - count) :]):
        digest.update(end.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _add_file(digest: hashlib._Hash, file: Path) -> None:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise InvalidInput(f"{file} is not a safetensors file", why=str(error)) from None
        header.pop("__metadata__", None)  # who saved it does not matter
        digest.update(json.dumps(header, sort_keys=True).encode())
        for entry in header.values():
            start, stop = entry["data_offsets"]
            for offset in (start, max(start, stop - _SAMPLE)):
                stream.seek(8 + length + offset)
                digest.update(stream.read(min(_SAMPLE, stop - offset)))
