"""Copies of models on a node's own disk: made once, by all ranks and jobs of the node together, and used by later starts.

::

    CACHE/nnsight-hpc-UID/      0700: who may write here decides what a worker computes
      lock                      held while a model is noted as used, or old ones are taken away
      NAME/                     of one model, by its fingerprint and small files; its time is that of its last use
        FILE  FILE.lock  FILE.partial

A file is copied by who gets its lock (flock(2), which the kernel opens when its holder dies), and has its name once it is
whole and on the disk. So several ranks copy several files at once, and a copy that was cut off is begun again.

That a copy cannot be made is no failure: the disk is full, there is no such folder. The model is then read where it is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import stat
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nnsight_hpc.models import fingerprint
from nnsight_hpc.wire.errors import CorruptData, HpcError, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_WEIGHTS = "*.safetensors"
_OTHERS = ("*.json", "*.jinja", "*.model", "*.txt")
_PIECE = 16 << 20
_LOOK = 1.0
"""Seconds between two looks at what another process copies."""
_PATIENCE = 60.0
"""Seconds for which it may stand still."""
_UNUSED = 7 * 86400.0
"""Seconds after which a copy that nobody has used is taken away."""
_SPARE = 0.05
"""Of the disk, that a copy leaves free."""
logger = logging.getLogger(__name__)


def local_copy(
    source: Path, cache: str, *, moved: Callable[[int, int], None], leave: Callable[[], bool], turn: int = 0
) -> Path:
    """The copy of a model on this node, made if there is none yet; `source` itself where none can be made.

    Parameters
    ----------
    source
        The model's folder.
    cache
        A folder of the node's own disk; variables of the environment are put in.
    moved
        Called with how many bytes of the model are on this node, and how many there are, while some are missing.
    leave
        Asked while it copies and waits: whether to give up.
    turn
        A number of this process among those of its job on this node: each begins with another file.
    """
    begun = time.monotonic()
    try:
        copy = _Copy(source, _own_folder(cache), moved, leave)
        made = copy.make(turn)
    except (OSError, HpcError) as error:
        logger.warning("the model is read from %s, since it cannot be copied to this node: %s", source, error)
        return source
    where = "was copied to" if made else "is already on"
    logger.info("the model %s this node (%s) after %.1f s", where, copy.folder, time.monotonic() - begun)
    return copy.folder


def _own_folder(cache: str) -> Path:
    """The folder of this user in the cache; raises `OSError` when it is not his alone."""
    folder = Path(os.path.expandvars(cache)).expanduser() / f"nnsight-hpc-{os.getuid()}"
    if not folder.is_absolute():
        raise OSError(errno.EINVAL, "node_cache is no absolute path", str(folder))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise OSError(errno.EPERM, "others may write to it, or it is somebody else's", str(folder))
    return folder


class _Copy:
    """The copy of one model; `folder` is where it is, or is to be."""

    def __init__(self, source: Path, base: Path, moved: Callable[[int, int], None], leave: Callable[[], bool]) -> None:
        self._source, self._base, self._moved, self._leave = source, base, moved, leave
        weights, others = sorted(source.glob(_WEIGHTS)), sorted({f for name in _OTHERS for f in source.glob(name)})
        self._sizes = {file.name: file.stat().st_size for file in [*weights, *others]}
        self._fingerprint = fingerprint(source)
        self.folder = base / f"{self._fingerprint}-{_digest(others)}"

    def make(self, turn: int) -> bool:
        """Make it, with whoever else is at it; whether there was anything to do. Raises `OSError`."""
        with _locked(self._base / "lock"):
            self.folder.mkdir(mode=0o700, exist_ok=True)
            os.utime(self.folder)
            old = _take_away(self._base)
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)
        missing = self._missing()
        if missing:
            self._check_room()
            self._copy_all(missing[turn % len(missing) :] + missing[: turn % len(missing)])
        self._check()
        return bool(missing)

    def _check(self) -> None:
        """Remove a copy that is not what it should be: something has written to it, or the disk has lost it."""
        try:
            if fingerprint(self.folder) == self._fingerprint:
                return
        except InvalidInput:
            logger.info("a file of the copy is none of weights")
        shutil.rmtree(self.folder, ignore_errors=True)
        raise CorruptData("the copy on this node was damaged, and is removed", where=str(self.folder))

    def _missing(self) -> list[str]:
        return [name for name in self._sizes if not self._is_whole(name)]

    def _is_whole(self, name: str) -> bool:
        return _size(self.folder / name) == self._sizes[name]

    def _there(self) -> int:
        """Bytes that are on this node."""
        return sum(_size(self.folder / f"{name}{end}") or 0 for name in self._sizes for end in ("", ".partial"))

    def _check_room(self) -> None:
        disk, needed = shutil.disk_usage(self._base), sum(self._sizes.values()) - self._there()
        if disk.free - needed < _SPARE * disk.total:
            raise OSError(errno.ENOSPC, f"it needs {needed >> 20} MiB, {disk.free >> 20} MiB are free", str(self._base))

    def _copy_all(self, missing: list[str]) -> None:
        """Copy what nobody else copies, and wait for what others do."""
        there, grew = self._there(), time.monotonic()
        while missing := [name for name in missing if not self._settle(name)]:
            time.sleep(_LOOK)
            self._report()
            before, there = there, self._there()
            grew = time.monotonic() if there > before else grew
            if time.monotonic() - grew > _PATIENCE:
                raise OSError(errno.ETIMEDOUT, f"another process holds it, and does not go on: {missing[0]}")

    def _settle(self, name: str) -> bool:
        """Have a file whole, unless somebody else is at it just now."""
        with (self.folder / f"{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return self._is_whole(name)
            if not self._is_whole(name):
                self._copy(name)
            return True

    def _copy(self, name: str) -> None:
        partial = self.folder / f"{name}.partial"
        try:
            with (self._source / name).open("rb") as reader, partial.open("wb") as writer:
                while os.sendfile(writer.fileno(), reader.fileno(), None, _PIECE):
                    self._report()
                os.fsync(writer.fileno())
            partial.replace(self.folder / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):  # what there is of it is of no use, and the disk is full
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _report(self) -> None:
        if self._leave():
            raise InterruptedError("the worker is to end")
        self._moved(self._there(), sum(self._sizes.values()))


def _size(file: Path) -> int | None:
    """The bytes of a file, if it is there: another process may rename it at any moment."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def _digest(files: list[Path]) -> str:
    """Tells apart models of the same weights with another configuration or tokenizer."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _take_away(base: Path) -> list[Path]:
    """Rename the copies that nobody has used for long, so that nobody begins to; the caller removes them."""
    old = [path for path in base.iterdir() if path.is_dir() and time.time() - path.stat().st_mtime > _UNUSED]
    if old:
        logger.info("%d copies of models are removed from %s: nobody used them for a week", len(old), base)
    return [path.rename(path.with_name(f"{path.name[:49]}.{secrets.token_hex(4)}")) for path in old]
