"""Copying a dataset from the cluster: every byte is checked, a broken transfer goes on where it stopped.

The copy grows in ``NAME.zarr.partial`` (or ``.hdf5``) and each file in ``*.partial``; a file gets its name when its checksum
is right, the dataset's own attributes come last, and the folder gets its name when the whole agrees with its manifest. So
nothing unfinished looks whole. `client.fetch_part` copies a part of a dataset.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from nnsight_hpc.client.app import note
from nnsight_hpc.client.download import bytes_there, download, file_url, is_there
from nnsight_hpc.client.progress import Progress
from nnsight_hpc.client.streams import spread
from nnsight_hpc.client.tables import size
from nnsight_hpc.client.tally import Tally
from nnsight_hpc.storage import ActivationDataset, dataset_folder, read_manifest, resolve_inside
from nnsight_hpc.storage.schema import METADATA
from nnsight_hpc.wire.errors import Conflict, CorruptData, HpcError, Incompatible
from nnsight_hpc.wire.files import free_bytes, sync_folder
from nnsight_hpc.wire.messages import DatasetFile, DatasetStatus

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from nnsight_hpc.client.patience import PatientClient
    from nnsight_hpc.storage.schema import Store
    from nnsight_hpc.wire.http import HttpClient

STREAMS = 3
"""Most streams of one copy. Several fill a long line, where each waits for its window; see `benchmarks/fetch.py`."""
_WORTH_A_STREAM = 256 << 20
"""Bytes: a further stream costs the start of a program over there, and perhaps a login."""


def fetch(clients: Sequence[PatientClient], name: str, folder: Path) -> Path:
    """Copy the dataset `name` to ``folder/NAME.zarr`` or ``folder/NAME.hdf5``; the path of the copy.

    Parameters
    ----------
    clients
        One for each stream (`session.dataset_clients`); a small dataset takes the first ones.

    Raises
    ------
    NotFound, Conflict
        There is no such dataset; it is still being written, or the copy exists.
    CorruptData
        Bytes arrive damaged, or lie damaged over there.
    Unreachable
        The connection does not last: the next call goes on.
    HpcError
        It does not fit on the disk.
    """
    client = clients[0]
    goal = goal_of(client, name, folder)
    files = client.get(f"/v1/datasets/{name}/files", list[DatasetFile], timeout=600)
    with working_folder(goal, goal.with_name(f"{goal.name}.partial")) as partial:
        targets = {file.path: resolve_inside(partial, file.path) for file in files}
        check_room(partial, sum(file.size - bytes_there(targets[file.path]) for file in files))
        with Progress(f"fetch {name}") as progress, counted(sum(file.size for file in files), progress) as tally:

            def bring(stream: HttpClient, file: DatasetFile) -> None:
                if is_there(targets[file.path], file):
                    tally.found(file.size)
                else:
                    download(stream, file_url(name, file.path), targets[file.path], file, tally)

            roots, streams = set(METADATA.values()), clients[: streams_for(tally.total)]
            spread(streams, [file for file in files if file.path not in roots], bring)
            spread([client], [file for file in files if file.path in roots], bring)
        _check_against_manifest(partial, files)
        publish(partial, goal)
    return goal


def streams_for(size: int) -> int:
    """How many streams a copy of so many bytes is worth."""
    return max(1, size // _WORTH_A_STREAM)


def goal_of(client: HttpClient, name: str, folder: Path) -> Path:
    """Where a copy of a dataset, or of a part of it, is to lie; raises why none can be made."""
    status = client.get(f"/v1/datasets/{name}", DatasetStatus)
    if not status.complete:
        raise Conflict(f"the dataset {name} is not complete yet", where=status.path, next="nnsight-hpc queue")
    goal = dataset_folder(folder, name, _store(status))
    if goal.exists():
        raise Conflict(f"{goal} exists", next="remove it, or give another folder with --to")
    return goal


@contextmanager
def working_folder(goal: Path, partial: Path) -> Iterator[Path]:
    """The folder `partial` of an unfinished copy, for one process at a time; Ctrl-C says that it stays."""
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if goal.exists():  # another process was just done with it
            raise Conflict(f"{goal} exists", next="remove it, or give another folder with --to")
        yield partial
    except KeyboardInterrupt:
        note(f"Interrupted: what has come stays in {partial}; the same command goes on with it.")
        raise
    except BlockingIOError:
        raise Conflict(f"another process is fetching into {partial}") from None
    finally:
        os.close(descriptor)


@contextmanager
def counted(total: int, progress: Progress) -> Iterator[Tally]:
    """A tally of `total` bytes, which ends all streams when the block is left."""
    tally = Tally(total, progress)
    try:
        yield tally
    finally:
        tally.stop()


def check_room(folder: Path, needed: int) -> None:
    """Refuse a copy for which the disk has no room."""
    if needed > (free := free_bytes(folder)):
        raise HpcError(
            "the dataset does not fit there",
            where=str(folder),
            why=f"{size(needed)} are to come, {size(free)} are free",
            next="free space, give another folder with --to, or fetch a part (--capture, --documents, --tokens)",
        )


def publish(copy: Path, goal: Path) -> None:
    """Give a copy its name, once it opens."""
    ActivationDataset(copy)
    copy.rename(goal)
    sync_folder(goal.parent)


def _store(dataset: DatasetStatus) -> Store:
    """The format of a dataset."""
    ending = PurePosixPath(dataset.path).suffix.removeprefix(".")
    for store in METADATA:
        if store == ending:
            return store
    raise Incompatible(
        "the dataset has a format that this version does not know", where=dataset.path, next="update nnsight-hpc"
    )


def _check_against_manifest(copy: Path, files: list[DatasetFile]) -> None:
    """Each file is what the other side has announced; of shards this has to be what their writer wrote down."""
    came = {file.path: (file.size, file.crc32c) for file in files}
    wrong = [
        entry.path for entry in read_manifest(copy) if came.get(entry.path) != (entry.bytes, int(entry.crc32c, 16))
    ]
    if wrong:
        raise CorruptData(
            f"{len(wrong)} of the dataset's files are not those of its manifest",
            where=str(copy),
            why="\n".join(wrong[:20]),
            next="they are damaged on the cluster: verify the dataset there",
        )
