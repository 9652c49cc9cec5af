"""Files on shared file systems: written whole or not at all, and read without trusting a stale directory."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def replacing(path: Path, *, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` when the block ends without an error.

    The bytes are on disk (fsync of file and folder) before the name exists, and the unfinished file is removed after
    an error. Readers see the old file or the new one, never a part.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Make `data` the content of `path`, with permissions `mode`; see `replacing`."""
    with replacing(path, mode=mode) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable (a rename is not, until its folder is synced)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_if_there(path: Path) -> bytes | None:
    """The content of `path`, or None. The folder is opened first: an NFS client then asks the server again."""
    try:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return path.read_bytes()
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None


def free_bytes(path: Path) -> int:
    """Bytes that the file system of `path`, which need not be there yet, has left for this user.

    A quota shows in them where the file system counts it there.
    """
    return shutil.disk_usage(next(one for one in (path, *path.absolute().parents) if one.exists())).free
