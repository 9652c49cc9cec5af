"""Why a request is not taken, does not run, or has no result: conflicts with what there is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from nnsight_hpc.daemon.words import duration
from nnsight_hpc.storage import read_attributes
from nnsight_hpc.wire.errors import Conflict, Denied, HpcError, InvalidInput, NotFound, RequestCancelled, from_report
from nnsight_hpc.wire.messages import DumpSpec
from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.daemon.table import Row
    from nnsight_hpc.wire.messages import ModelIdentity


def check_own(what: str, owner: str, user: str, *, where: str = "") -> None:
    """Raise `Denied` when `what` belongs to another than `user`."""
    if owner != user:
        raise Denied(f"{what} is somebody else's", where=where)


def check_dataset_is_free(dump: DumpSpec, last: Row | None, folder: Path, user: str) -> None:
    """Raise `Conflict` when the dataset exists, is being written, or is another user's.

    One whose request failed may be asked for again with the very same settings: the worker goes on where it was.
    """
    if last is not None and last.user != user:
        raise Conflict(f"dataset {dump.name} is somebody else's", next="choose another name")
    if last is not None and not last.state.ended:
        raise Conflict(
            f"dataset {dump.name} is being written", where=f"request {last.id}", next="choose another name, or wait"
        )
    if not folder.exists():
        return
    if last is None or last.dump is None or (last.state == RequestState.COMPLETED and not _is_reopened(folder)):
        raise Conflict(
            f"dataset {dump.name} exists",
            where=str(folder),
            next=f"choose another name, or `nnsight-hpc rm {dump.name}` first",
        )
    settings = [name for name in DumpSpec.__struct_fields__ if name != "command"]
    if differing := [name for name in settings if getattr(dump, name) != getattr(last.dump, name)]:
        raise Conflict(
            f"dataset {dump.name} was begun with other settings",
            where=f"request {last.id}",
            why="\n".join(f"{name}: then {getattr(last.dump, name)}, now {getattr(dump, name)}" for name in differing),
            next="dump with the same settings to go on, remove the dataset, or choose another name",
        )


def _is_reopened(folder: Path) -> bool:
    """Whether damaged slices of a dataset that was complete are to be written again."""
    try:
        return not read_attributes(folder).complete
    except HpcError:
        return False


def fingerprint_error(pool: str, held: ModelIdentity | None, wanted: str) -> Conflict | None:
    """Why a graph made for the weights `wanted` cannot run on a pool that holds `held`, as far as both are known.

    Fingerprints of different kinds (``KIND-DIGITS``: of files, of tensors) say nothing about each other.
    """
    if not wanted or held is None or held.fingerprint in ("", wanted):
        return None
    if wanted.rpartition("-")[0] != held.fingerprint.rpartition("-")[0]:
        return None
    return Conflict(
        f"pool {pool} holds another model than the one the graph was made for",
        why=f"the pool's fingerprint is {held.fingerprint} ({held.id}), the graph's is {wanted}",
        next="trace with the pool's model, or name another pool",
    )


def needs_error(pool: str, needs: float, longest: float) -> InvalidInput | None:
    """Why no replica of the pool will see the end of a request, if so; both times in seconds.

    Parameters
    ----------
    longest
        What is left of a replica's walltime once it has loaded, as far as known.
    """
    if needs <= longest:
        return None
    return InvalidInput(
        f"the request takes longer than a replica of pool {pool} lives",
        why=f"it needs {duration(needs)}, as far as known; a replica that has loaded has {duration(longest)} left of its "
        "walltime",
        next="give the pool a longer walltime (`nnsight-hpc up … --time …`), or split the request",
    )


def expired_error(row: Row) -> HpcError:
    """Why a request is not kept waiting any longer."""
    waited = duration(time.time() - row.times[RequestState.QUEUED])
    return HpcError(
        f"request {row.id} has waited for {waited}, and is not kept any longer",
        where=f"pool {row.pool}",
        next="see what the pool waits for (`nnsight-hpc status`), and send the request again",
    )


def result_error(row: Row) -> HpcError | None:
    """Why `row` has no result to give, or None when it has one."""
    if row.state == RequestState.COMPLETED:
        removed = NotFound(f"request {row.id} has no result", why=row.note, next="send it again")
        return None if row.result_bytes else removed
    if row.state == RequestState.CANCELLED:
        return RequestCancelled(f"request {row.id} was cancelled")
    if row.error is not None:
        return from_report(row.error)
    return Conflict(f"request {row.id} has not ended", why=f"it is {row.state}", next=f"`nnsight-hpc wait {row.id}`")
