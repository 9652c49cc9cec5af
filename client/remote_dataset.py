"""A dataset on a cluster, read through the tunnel without a copy: ``ActivationDataset("uni:run1")``.

Its metadata and manifest are copied to a temporary folder; rows are asked for as byte ranges of its shard files, over one
connection that stays open, and is made anew when it was lost. A forked or spawned process has a connection of its own.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING

import google_crc32c

from nnsight_hpc.client.download import file_url
from nnsight_hpc.client.patience import WHILE_WAITING
from nnsight_hpc.client.session import dataset_clients
from nnsight_hpc.storage import resolve_inside
from nnsight_hpc.storage.files import CachedFiles
from nnsight_hpc.storage.manifest import MANIFEST
from nnsight_hpc.storage.schema import METADATA
from nnsight_hpc.storage.sources import Source
from nnsight_hpc.wire.errors import Conflict, CorruptData
from nnsight_hpc.wire.messages import DatasetFile

if TYPE_CHECKING:
    from nnsight_hpc.wire.http import HttpClient


def open_remote(cluster: str, name: str) -> Source:
    """The complete dataset `name` on `cluster`; the entry point ``remote`` of ``nnsight_hpc.datasets``.

    Raises
    ------
    NotFound
        There is no such cluster, or no such dataset there.
    Conflict
        The dataset is not complete.
    Unreachable, Denied
        No connection can be made.
    """
    files = RemoteFiles(cluster, name)
    try:
        described = Described(files.client, name)
    except BaseException:
        files.close()
        raise

    def close() -> None:
        files.close()
        described.close()

    return Source(f"{cluster}:{name}", described.root, CachedFiles(files, described.sizes), close)


class Described:
    """A temporary folder with the metadata and the manifest of a dataset; and the sizes of all its files."""

    def __init__(self, client: HttpClient, name: str) -> None:
        files = client.get(f"/v1/datasets/{name}/files", list[DatasetFile], timeout=600)
        self.sizes = {file.path: file.size for file in files}
        self._folder = TemporaryDirectory(prefix="nnsight-hpc-")
        self.root = Path(self._folder.name)
        for file in files:
            if PurePosixPath(file.path).name in (MANIFEST, *METADATA.values()):
                self._bring(client, name, file)

    def close(self) -> None:
        self._folder.cleanup()

    def _bring(self, client: HttpClient, name: str, file: DatasetFile) -> None:
        path = resolve_inside(self.root, file.path)
        content = bytearray()
        client.download(file_url(name, file.path), content.extend)
        if google_crc32c.value(bytes(content)) != file.crc32c:
            raise CorruptData(f"{file.path} arrived damaged", where=name, next="open the dataset again")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


class StreamFiles:
    """`storage.files.Files` over one client, and so for one thread."""

    def __init__(self, client: HttpClient, cluster: str, name: str) -> None:
        self._client, self._cluster, self._name = client, cluster, name

    def where(self, path: str) -> str:
        return f"{self._cluster}:{self._name}/{path}"

    def read_into(self, path: str, offset: int, memory: memoryview) -> None:
        wanted, position = len(memory), 0

        def fill(block: bytes) -> None:
            nonlocal position
            memory[position : position + len(block)] = block[: wanted - position]
            position += len(block)

        if wanted:
            self._client.download(file_url(self._name, path), fill, start=offset, stop=offset + wanted)
        if position != wanted:
            raise CorruptData("a shard of the dataset is too short", where=self.where(path), next="dump it again")


class _Connection:
    """The connection of one process, for its threads in turn."""

    def __init__(self, cluster: str, name: str) -> None:
        self.process, self.lock = os.getpid(), Lock()
        self.client = dataset_clients(cluster, patience=WHILE_WAITING)()
        self.files = StreamFiles(self.client, cluster, name)


class RemoteFiles:
    """`storage.files.Files` for threads and processes: threads share a connection, each process has its own."""

    def __init__(self, cluster: str, name: str) -> None:
        self._cluster, self._name = cluster, name
        self._closed = False
        self._connection = _Connection(cluster, name)

    def __reduce__(self) -> tuple[type[RemoteFiles], tuple[str, str]]:
        return RemoteFiles, (self._cluster, self._name)

    @property
    def client(self) -> HttpClient:
        return self._connection.client

    def where(self, path: str) -> str:
        return self._connection.files.where(path)

    def read_into(self, path: str, offset: int, memory: memoryview) -> None:
        if self._closed:
            raise Conflict("the dataset is closed", where=self.where(path), next="open it again")
        connection = self._connection
        if connection.process != os.getpid():  # after a fork; the parent's connection is the parent's
            connection = self._connection = _Connection(self._cluster, self._name)
        with connection.lock:
            connection.files.read_into(path, offset, memory)

    def close(self) -> None:
        self._closed = True
        if self._connection.process == os.getpid():
            self.client.close()
