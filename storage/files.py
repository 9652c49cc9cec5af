"""Where the bytes of a dataset's files come from.

All reading of shards goes through one call, "fill this memory with these bytes of this file" (`Files`), so that a dataset
need not lie on a disk of this machine. Metadata and manifest are small, and always lie in a local folder.

Local files are read by position (pread). Memory maps are not used: cold on a disk they were 4 to 11 times slower, and
they have hung on shared file systems. A file is open only while it is read: nothing is left open when a program forks,
is interrupted or forgets a dataset.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from nnsight_hpc.wire.errors import CorruptData, HpcError

if TYPE_CHECKING:
    from pathlib import Path


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
            raise self._damaged("missing", path) from error
        except OSError as error:
            raise HpcError("a file of the dataset cannot be read", where=self.where(path), why=str(error)) from error

    def _read(self, path: str, offset: int, memory: memoryview) -> None:
        descriptor = os.open(self.where(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            while memory:
                count = os.preadv(descriptor, [memory], offset)
                if not count:
                    raise self._damaged("too short", path)
                memory, offset = memory[count:], offset + count
        finally:
            os.close(descriptor)

    def _damaged(self, how: str, path: str) -> CorruptData:
        return CorruptData(f"a shard of the dataset is {how}", where=self.where(path), next="fetch or write it again")
