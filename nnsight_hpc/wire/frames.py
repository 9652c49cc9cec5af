"""A frame: a JSON header and a block of bytes in one body. Requests, results and dumps travel and lie on disk so.

::

    8 bytes  length of the header, little-endian
    N bytes  the header, JSON in UTF-8
    rest     the block: for requests and results a safetensors file

Several frames in one have a list of their lengths as its header.
"""

from __future__ import annotations

import json
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_HEADER = 64 << 20


def pack(header: bytes, block: bytes | memoryview = b"") -> bytes:
    return b"".join((len(header).to_bytes(8, "little"), header, block))


def unpack(frame: bytes | memoryview) -> tuple[bytes, memoryview]:
    """Header and block of a frame; raises `InvalidInput` when the lengths do not fit."""
    view = memoryview(frame)
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > min(MAX_HEADER, len(view) - 8):
        raise InvalidInput("not a valid frame", why=f"{len(view)} bytes, of which the header would be {length}")
    return bytes(view[8 : 8 + length]), view[8 + length :]


def joined(frames: Sequence[bytes | memoryview]) -> bytes:
    """Several frames in one."""
    return pack(json.dumps([*map(len, frames)]).encode(), b"".join(frames))


def parted(frame: bytes | memoryview) -> list[memoryview]:
    """The frames in one that was made by `joined`."""
    lengths, block = unpack(frame)
    return [block[start:end] for start, end in pairwise(accumulate(json.loads(lengths), initial=0))]
