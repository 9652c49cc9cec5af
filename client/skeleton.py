"""A pool's model without its weights: the small files that a laptop needs to trace, fetched once and kept."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from nnsight_hpc.client import config
from nnsight_hpc.client.session import connect
from nnsight_hpc.wire.errors import CorruptData
from nnsight_hpc.wire.messages import ModelIdentity, PoolModel, encode
from nnsight_hpc.wire.names import check_name
from nnsight_hpc.wire.skeleton import NAMES

if TYPE_CHECKING:
    from nnsight_hpc.wire.http import HttpClient
    from nnsight_hpc.wire.messages import ModelFile


def pool_skeleton(name: str, cluster: str | None = None) -> tuple[Path, ModelIdentity]:
    """A folder with the config, tokenizer and chat template of the model that a pool holds, and which model that is.

    The files are kept in the user's cache folder under their checksums, and fetched again only when they change. The
    fingerprint is empty while no worker of the pool has seen the weights.

    Raises
    ------
    NotFound
        There is no such pool.
    Conflict
        No worker has found the model yet; says what the pool waits for.
    CorruptData
        A file did not come as it was announced.
    """
    where = f"/v1/pools/{check_name(name, of='pool')}/model"
    with closing(connect(cluster or config.load().bound(name))) as daemon:
        found = daemon.get(where, PoolModel)
        digest = hashlib.sha256(encode(list(found.files))).hexdigest()[:16]
        folder = _cache() / f"{found.model.fingerprint[:16] or 'unseen'}-{digest}"
        if not folder.is_dir():
            _fetch(daemon, where, found.files, folder)
    return folder, found.model


def _cache() -> Path:
    import platformdirs  # noqa: PLC0415 - as elsewhere in the client: 30 ms that most programs do not need

    return Path(platformdirs.user_cache_dir("nnsight-hpc", appauthor=False)) / "pools"


def _fetch(daemon: HttpClient, where: str, files: tuple[ModelFile, ...], folder: Path) -> None:
    """Fetch `files` into `folder`, which is there only when all of them are."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        for file in files:
            if file.name not in NAMES:
                continue  # a newer daemon knows more; a name is never a path
            data = daemon.call("GET", f"{where}/{quote(file.name)}", timeout=300)
            if (len(data), hashlib.sha256(data).hexdigest()) != (file.size, file.sha256):
                raise CorruptData(
                    f"{file.name} of the pool's model did not come as announced",
                    where=where,
                    why=f"{len(data)} bytes of {file.size}, or another checksum",
                    next="try again; the model may just have been changed",
                )
            (partial / file.name).write_bytes(data)
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise
