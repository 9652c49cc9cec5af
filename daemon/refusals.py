"""Why a request is not taken, does not run, or has no result: conflicts with what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import Conflict, HpcError, RequestCancelled, from_report
from nnsight_hpc.wire.messages import DumpSpec
from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.daemon.table import Row
    from nnsight_hpc.wire.messages import ModelIdentity


def check_dataset_is_free(dump: DumpSpec, last: Row | None, folder: Path) -> None:
    """Raise `Conflict` when the dataset exists or is being written.

    One whose request failed may be asked for again with the very same settings: the worker goes on where it was.
    """
    if last is not None and not last.state.ended:
        raise Conflict(
            f"dataset {dump.name} is being written", where=f"request {last.id}", next="choose another name, or wait"
        )
    if not folder.exists():
        return
    if last is None or last.dump is None or last.state == RequestState.COMPLETED:
        raise Conflict(
            f"dataset {dump.name} exists",
            where=str(folder),
            next=f"choose another name, or `nnsight-hpc remove {dump.name}` first",
        )
    settings = [name for name in DumpSpec.__struct_fields__ if name != "command"]
    if differing := [name for name in settings if getattr(dump, name) != getattr(last.dump, name)]:
        raise Conflict(
            f"dataset {dump.name} was begun with other settings",
            where=f"request {last.id}",
            why="\n".join(f"{name}: then {getattr(last.dump, name)}, now {getattr(dump, name)}" for name in differing),
            next="dump with the same settings to go on, remove the dataset, or choose another name",
        )


def fingerprint_error(pool: str, held: ModelIdentity | None, wanted: str) -> Conflict | None:
    """Why a graph made for the weights `wanted` cannot run on a pool that holds `held`, as far as both are known."""
    if not wanted or held is None or held.fingerprint in ("", wanted):
        return None
    return Conflict(
        f"pool {pool} holds another model than the one the graph was made for",
        why=f"the pool's fingerprint is {held.fingerprint} ({held.id}), the graph's is {wanted}",
        next="trace with the pool's model, or name another pool",
    )


def result_error(row: Row) -> HpcError | None:
    """Why `row` has no result to give, or None when it has one."""
    if row.state == RequestState.COMPLETED:
        return None
    if row.state == RequestState.CANCELLED:
        return RequestCancelled(f"request {row.id} was cancelled")
    if row.error is not None:
        return from_report(row.error)
    return Conflict(f"request {row.id} has not ended", why=f"it is {row.state}", next=f"`nnsight-hpc wait {row.id}`")
