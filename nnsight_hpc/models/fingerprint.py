"""A short name for a model's weights: equal for two copies of the same files, different for any fine-tune of them.

It reads the headers of the safetensors files and the first and last 4 KiB of every tensor, so it costs milliseconds, also
for a model of hundreds of gigabytes. An edit that leaves both ends of every tensor untouched is not seen; for a proof of
every byte there are the checksums of the files' origin.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from nnsight_hpc.wire.errors import InvalidInput, NotFound

_SAMPLE = 4096


def fingerprint(folder: str | Path) -> str:
    """The fingerprint of the model in `folder`: 32 hexadecimal digits over its config and its safetensors files.

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
