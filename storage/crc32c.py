"""The CRC-32C of a file whose pieces come in any order, without reading one of them again.

Bytes are polynomials over GF(2), and a checksum is what a division leaves of one. So n bytes behind what has the checksum
c make it c times x^8n, plus their own: all that is to be known of a piece is its checksum and its size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import google_crc32c

if TYPE_CHECKING:
    import numpy.typing as npt

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, the bit of x^0 first, as in all that follows
_ONE, _BYTE = 1 << 31, 1 << 23  # x^0 and x^8


class PiecewiseChecksum:
    """The checksum of what `add` is given: pieces of a file, which touch but do not overlap."""

    def __init__(self) -> None:
        self._pieces: dict[int, tuple[int, int]] = {}  # by its end: where it begins, and its checksum

    def add(self, offset: int, content: bytes | npt.NDArray[Any]) -> None:
        """Add the bytes at `offset`; those that go on where others end cost nothing at the end."""
        start, checksum = self._pieces.pop(offset, (offset, 0))
        self._pieces[offset + len(content)] = start, google_crc32c.extend(checksum, content)

    def value(self) -> int:
        """That of all pieces, one after another."""
        whole = 0
        for end, (start, checksum) in sorted(self._pieces.items()):
            whole = _times(whole, _power(end - start)) ^ checksum
        return whole


@lru_cache(4096)
def _power(size: int) -> int:
    """By what so many bytes behind it multiply a checksum."""
    power, square = _ONE, _BYTE
    while size:
        if size & 1:
            power = _times(power, square)
        square = _times(square, square)
        size >>= 1
    return power


def _times(one: int, other: int) -> int:
    """The product of two polynomials, modulo that of the checksum."""
    product = 0
    while one:
        if one & _ONE:
            product ^= other
        one = one << 1 & 0xFFFFFFFF
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product
