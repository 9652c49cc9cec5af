"""Where the bytes of a dataset's files come from.

All reading of shards goes through one call, "fill this memory with these bytes of this file" (`Files`), so that a dataset
need not lie on a disk of this machine. Metadata and manifest are small, and always lie in a local folder. `CachedFiles` is
for files that are far away.

Local files are read by position (pread). Memory maps are not used: cold on a disk they were 4 to 11 times slower, and
they have hung on shared file systems. A file is open only while it is read: nothing is left open when a program forks,
is interrupted or forgets a dataset.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from nnsight_hpc.wire.errors import CorruptData, HpcError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_BLOCK = 64 << 10
_BLOCKS = 1024
"""Of a cache: 64 MiB."""


class Files(Protocol):
    """The files of a dataset, by their paths below its root; from several threads and processes at once."""

    def read_into(self, path: str, offset: int, memory: memoryview) -> None:
        """Fill `memory` (bytes) with those of the file from `offset` on.

        Raises
        ------
        CorruptData
            The file is missing, or too short.
        """

    def where(self, path: str) -> str:
        """The file's name, for people."""


class LocalFiles:
    """Files below a folder of this machine (or of a file system that it mounts)."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)  # joining paths takes longer than opening a file

    def where(self, path: str) -> str:
        return f"{self._root}/{path}"

    def read_into(self, path: str, offset: int, memory: memoryview) -> None:
        try:
            self._read(path, offset, memory)
        except FileNotFoundError as error:
            raise damaged("missing", self.where(path)) from error
        except OSError as error:
            raise HpcError("a file of the dataset cannot be read", where=self.where(path), why=str(error)) from error

    def _read(self, path: str, offset: int, memory: memoryview) -> None:
        descriptor = os.open(self.where(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            while memory:
                count = os.preadv(descriptor, [memory], offset)
                if not count:
                    raise damaged("too short", self.where(path))
                memory, offset = memory[count:], offset + count
        finally:
            os.close(descriptor)


class CachedFiles:
    """Files that are far away, with a bounded memory: small reads that lie close together are one journey.

    Reads of 64 KiB or more, as of the chunks of activations, take what they ask for and are not kept.

    Parameters
    ----------
    sizes
        Bytes of each file, by its path.
    """

    def __init__(self, files: Files, sizes: Mapping[str, int]) -> None:
        self._files, self._sizes = files, sizes
        self._block = lru_cache(_BLOCKS)(self._read_block)

    def __reduce__(self) -> tuple[type[CachedFiles], tuple[Files, Mapping[str, int]]]:
        return CachedFiles, (self._files, self._sizes)

    def where(self, path: str) -> str:
        return self._files.where(path)

    def read_into(self, path: str, offset: int, memory: memoryview) -> None:
        if path not in self._sizes:
            raise damaged("missing", self.where(path))
        if offset + len(memory) > self._sizes[path]:
            raise damaged("too short", self.where(path))
        if len(memory) >= _BLOCK:
            self._files.read_into(path, offset, memory)
            return
        while memory:
            part = self._block(path, offset // _BLOCK)[offset % _BLOCK :][: len(memory)]
            memory[: len(part)] = part
            memory, offset = memory[len(part) :], offset + len(part)

    def _read_block(self, path: str, number: int) -> bytes:
        start = number * _BLOCK
        block = bytearray(min(_BLOCK, self._sizes[path] - start))
        self._files.read_into(path, start, memoryview(block))
        return bytes(block)


def damaged(how: str, where: str) -> CorruptData:
    return CorruptData(f"a shard of the dataset is {how}", where=where, next="fetch or write it again")
