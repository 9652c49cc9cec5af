"""``nnsight-hpc dumps``, and the verbs of ``nnsight-hpc dump``: how far dumps are, and what is done to one."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import click

from nnsight_hpc.client.app import App, command, note, pass_app
from nnsight_hpc.client.patience import WHILE_WAITING
from nnsight_hpc.client.progress import Progress
from nnsight_hpc.client.tables import Table, duration, print_blocks, size
from nnsight_hpc.client.waiting import check_completed, wait_for_request
from nnsight_hpc.client.words import dump_rate, dump_words, request_words, time_left
from nnsight_hpc.wire.dumps import DatasetCheck, DumpStatus
from nnsight_hpc.wire.errors import CorruptData, from_report
from nnsight_hpc.wire.messages import DumpProgress, RequestStatus, decode
from nnsight_hpc.wire.names import check_name

if TYPE_CHECKING:
    from nnsight_hpc.wire.dumps import DamagedFile
    from nnsight_hpc.wire.http import HttpClient

_BAR = 10
"""Characters of a bar."""
_POLL = 20.0
_SHOWN = 10


@command()
@pass_app
def dumps(app: App) -> None:
    """List dumps: how far they are, and when they will be done."""
    found = app.client(start=False).get("/v1/dumps", list[DumpStatus])
    headers = ["dump", "state", "done", "tokens/s", "left", "workers", "size"]
    app.answer(found, lambda: print_blocks([Table(headers, list(map(_row, found)), "No dumps.")]))


_NAME = click.argument("name", callback=lambda _context, _parameter, name: check_name(name, of="dataset"))


@command()
@_NAME
@pass_app
def status(app: App, name: str) -> None:
    """Show which slices are written, and who writes."""
    found = app.client(start=False).get(f"/v1/dumps/{name}", DumpStatus)
    app.answer(found, lambda: print_blocks(_blocks(found)))


@command()
@_NAME
@pass_app
def pause(app: App, name: str) -> None:
    """Have a dump wait until it is resumed.

    It stops after the batches that run; what is written stays.
    """
    _tell(app, name, "pause")


@command()
@_NAME
@pass_app
def resume(app: App, name: str) -> None:
    """Have a dump go on that was paused."""
    _tell(app, name, "resume")


@command()
@_NAME
@pass_app
def cancel(app: App, name: str) -> None:
    """Cancel a dump.

    What is written stays, and the same dump sent again goes on with it.
    """
    client = app.client()
    request = client.get(f"/v1/dumps/{name}", DumpStatus).request.id
    ended = decode(client.call("DELETE", f"/v1/requests/{request}"), RequestStatus)
    words = "" if ended.state.ended else ": it is being cancelled"
    app.answer(ended, lambda: print(f"Dump {name} {ended.state.lower()}{words}."))


@command()
@_NAME
@pass_app
def verify(app: App, name: str) -> None:
    """Compute all checksums again, where the dataset lies.

    Fails where a file is missing or damaged, and says which rows and documents it holds.
    """
    _, found = _checked(app.client(patience=WHILE_WAITING), name)
    if found.damage:
        raise _damage_error(app, name, found.damage)
    app.answer(found, lambda: print(f"Dataset {name}: {size(found.total)}, all checksums are right."))


@command()
@_NAME
@pass_app
def repair(app: App, name: str) -> None:
    """Have what is damaged or missing written again.

    A pool writes the slices to which that belongs, and no other; waits until it has.
    """
    client = app.client(patience=WHILE_WAITING)
    check, found = _checked(client, name)
    begun = decode(client.call("POST", f"/v1/dumps/{name}/repair?check={check}", timeout=600), DumpStatus)
    if begun.complete:
        app.answer(begun, lambda: print(f"Dataset {name} is whole: nothing is to be done."))
        return
    note(f"{len(found.damage)} files are damaged; {begun.slices - begun.written} of {begun.slices} slices are written.")
    check_completed(wait_for_request(client, begun.request.id, program=app.program))
    whole = client.get(f"/v1/dumps/{name}", DumpStatus)
    app.answer(whole, lambda: print(f"Dataset {name} is whole again: {whole.path}"))


def _tell(app: App, name: str, what: str) -> None:
    found = decode(app.client().call("POST", f"/v1/dumps/{name}/{what}"), DumpStatus)
    app.answer(found, lambda: print(f"Dump {name}: {_state(found)}"))


def _checked(client: HttpClient, name: str) -> tuple[str, DatasetCheck]:
    """Have a dataset checked: the name of the check, and what it has found."""
    check, found = f"c-{secrets.token_hex(6)}", DatasetCheck(done=0, total=0)
    with Progress(f"verify {name}") as progress:
        while not found.over:
            path = f"/v1/dumps/{name}/verify?check={check}&wait={_POLL:g}&seen={found.done}"
            found = decode(client.call("POST", path, timeout=_POLL + 15), DatasetCheck)
            progress.show(f"{size(found.done)} of {size(found.total)}", done=found.done, total=found.total)
    return check, found


def _damage_error(app: App, name: str, damage: tuple[DamagedFile, ...]) -> CorruptData:
    lines = list(map(_damage_words, damage))
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return CorruptData(
        f"{len(damage)} files of dataset {name} are damaged",
        why="\n".join([*lines[:_SHOWN], *more]),
        next=f"{app.program} dump repair {name}",
    )


def _damage_words(one: DamagedFile) -> str:
    words = [f"{one.path}: {one.problem}", f"rows {one.rows[0]} to {one.rows[1] - 1}"]
    if one.documents[1]:
        words.append(f"documents {one.documents[0]} to {one.documents[1] - 1}")
    return ", ".join(words)


def _row(dump: DumpStatus) -> list[str]:
    progress = dump.request.progress or DumpProgress()
    rate, left = dump_rate(progress), time_left(progress)
    workers = str(progress.workers) if progress.workers else ""
    shown = [_done(progress), f"{rate:.0f}" if rate else "", duration(left) if left else "", workers]
    return [dump.name, _state(dump), *shown, size(progress.bytes) if progress.bytes else ""]


def _state(dump: DumpStatus) -> str:
    return "paused" if dump.request.paused else dump.request.state.lower()


def _done(progress: DumpProgress) -> str:
    """A bar, and how many percent it stands for."""
    if not progress.tokens_total:
        return ""
    share = progress.tokens / progress.tokens_total
    full = int(share * _BAR)
    return f"{'#' * full}{'.' * (_BAR - full)} {share:4.0%}"


def _blocks(dump: DumpStatus) -> list[str | Table]:
    request = dump.request
    head = f"Dump {dump.name}, request {request.id}: {request_words(request)}\n{dump.path}"
    missing = dump.slices - dump.written - len(dump.doing)
    slices = f"{dump.written} of {dump.slices} slices are written, {len(dump.doing)} are being written, {missing} are missing."
    rows = [
        [
            one.replica,
            "leads" if one.replica == dump.leads else "helps",
            str(one.slice),
            str(one.tokens),
            f"{one.speed:.0f}",
        ]
        for one in dump.doing
    ]
    return [
        head,
        dump_words(request.progress) if request.progress else "",
        slices if dump.slices else "No slice is planned yet.",
        Table(["worker", "", "slice", "tokens of it", "tokens/s"], rows),
        str(from_report(request.error)) if request.error else "",
    ]
