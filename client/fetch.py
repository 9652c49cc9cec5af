"""Copying a dataset from the cluster: every byte is checked, a broken transfer goes on where it stopped.

The copy grows in ``NAME.zarr.partial`` (or ``.hdf5``) and each file in ``*.partial``; a file gets its name when its checksum
is right, the dataset's own attributes come last, and the folder gets its name when the whole has been verified. So nothing
unfinished looks whole.
"""

from __future__ import annotations

import fcntl
import os
import urllib.parse
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

import google_crc32c

from nnsight_hpc.client.progress import Progress
from nnsight_hpc.client.tables import size
from nnsight_hpc.storage import ActivationDataset, dataset_folder
from nnsight_hpc.storage.schema import METADATA
from nnsight_hpc.wire.errors import Conflict, CorruptData, Incompatible, InvalidInput, Unreachable
from nnsight_hpc.wire.files import sync_folder
from nnsight_hpc.wire.messages import DatasetFile, DatasetStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nnsight_hpc.storage.schema import Store
    from nnsight_hpc.wire.http import HttpClient

_BLOCK = 4 << 20
_TRIES = 3


def fetch(client: HttpClient, name: str, folder: Path) -> Path:
    """Copy the dataset `name` to ``folder/NAME.zarr`` or ``folder/NAME.hdf5``; the path of the copy.

    Raises `Conflict` when that exists or the dataset is still being written, `CorruptData` when bytes arrive damaged
    again and again, `Unreachable` when the connection does not last (call again to go on).
    """
    status = client.get(f"/v1/datasets/{name}", DatasetStatus)
    if not status.complete:
        raise Conflict(f"the dataset {name} is not complete yet", where=status.path, next="nnsight-hpc queue")
    goal = dataset_folder(folder, name, _store(status))
    if goal.exists():
        raise Conflict(f"{goal} exists", next="remove it, or give another folder with --to")
    files = client.get(f"/v1/datasets/{name}/files", list[DatasetFile], timeout=600)
    with _working_folder(goal) as partial:
        with Progress(f"fetch {name}") as progress:
            _fetch_all(client, name, partial, _root_last(files), progress)
            progress.show("verifies the copy")
            ActivationDataset(partial).verify()
        partial.rename(goal)
        sync_folder(folder)
    return goal


def _store(dataset: DatasetStatus) -> Store:
    """The format of a dataset."""
    ending = PurePosixPath(dataset.path).suffix.removeprefix(".")
    for store in METADATA:
        if store == ending:
            return store
    raise Incompatible(
        "the dataset has a format that this version does not know", where=dataset.path, next="update nnsight-hpc"
    )


def _root_last(files: list[DatasetFile]) -> list[DatasetFile]:
    roots = set(METADATA.values())
    return sorted(files, key=lambda file: (file.path in roots, file.path))


@contextmanager
def _working_folder(goal: Path) -> Iterator[Path]:
    """The folder of an unfinished copy, for one process at a time."""
    partial = goal.with_name(f"{goal.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
    except BlockingIOError:
        raise Conflict(f"another process is fetching into {partial}") from None
    finally:
        os.close(descriptor)


def _fetch_all(client: HttpClient, name: str, folder: Path, files: list[DatasetFile], progress: Progress) -> None:
    total = sum(file.size for file in files)
    done = 0

    def show(part: int) -> None:
        progress.show(f"{size(done + part)} of {size(total)}", done=done + part, total=total)

    for file in files:
        target = folder / _relative(file.path)
        if not _is_there(target, file):
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch_one(client, f"/v1/datasets/{name}/files/{urllib.parse.quote(file.path)}", target, file, show)
        done += file.size
        show(0)


def _relative(path: str) -> PurePosixPath:
    """A path that the other side gave, if it stays below the dataset."""
    relative = PurePosixPath(path)
    if not relative.parts or relative.is_absolute() or ".." in relative.parts or "\0" in path:
        raise InvalidInput(f"the dataset lists a file that lies outside it: {path!r}")
    return relative


def _is_there(target: Path, file: DatasetFile) -> bool:
    if not target.is_file() or target.stat().st_size != file.size:
        return False
    with target.open("rb") as existing:
        return _crc32c(existing) == file.crc32c


def _fetch_one(client: HttpClient, url: str, target: Path, file: DatasetFile, show: Callable[[int], None]) -> None:
    """Bring one file: after a lost connection from where it stopped, after a wrong checksum from the start."""
    partial = target.with_name(f"{target.name}.partial")
    length = checksum = 0
    for _ in range(_TRIES):
        length, checksum = _download(client, url, partial, file, show)
        if (length, checksum) == (file.size, file.crc32c):
            partial.rename(target)
            sync_folder(target.parent)
            return
        if length >= file.size:
            partial.unlink()
    if length < file.size:
        raise Unreachable(
            f"the connection was lost {_TRIES} times", where=file.path, next="fetch again to go on from there"
        )
    raise CorruptData(
        f"{file.path} arrived damaged",
        where=str(target),
        why=f"{length} bytes with crc32c {checksum:08x}, expected {file.size} with {file.crc32c:08x}",
        next="the file on the cluster may be damaged: verify the dataset there",
    )


def _download(
    client: HttpClient, url: str, partial: Path, file: DatasetFile, show: Callable[[int], None]
) -> tuple[int, int]:
    """Complete `partial` as far as the connection lasts; its size and checksum, computed while the bytes pass."""
    with partial.open("a+b") as output:
        output.seek(0)
        checksum, length = _crc32c(output), output.tell()

        def write(block: bytes) -> None:
            nonlocal checksum, length
            output.write(block)
            checksum, length = google_crc32c.extend(checksum, block), length + len(block)
            show(length)

        if length < file.size:
            with suppress(Unreachable, ConnectionError, TimeoutError):
                client.download(url, write, start=length)
        output.flush()
        os.fsync(output.fileno())
    return length, checksum


def _crc32c(file: BinaryIO) -> int:
    """The CRC-32C of a file from where it stands to its end."""
    checksum = 0
    while block := file.read(_BLOCK):
        checksum = google_crc32c.extend(checksum, block)
    return checksum
