"""``nnsight-hpc run``, ``wait``, ``result`` and ``cancel``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nnsight_hpc.client.app import App, command, note, pass_app
from nnsight_hpc.client.commands.sending_options import NEEDS, PRIORITY
from nnsight_hpc.client.completion import pool_names, request_ids, waiting_requests
from nnsight_hpc.client.patience import WHILE_WAITING
from nnsight_hpc.client.results import fetch_result
from nnsight_hpc.client.sending import request_id, request_path
from nnsight_hpc.client.tables import size
from nnsight_hpc.client.waiting import check_completed, wait_for_request
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.frames import pack, unpack
from nnsight_hpc.wire.messages import RequestStatus, decode
from nnsight_hpc.wire.names import check_request_id

if TYPE_CHECKING:
    from nnsight_hpc.wire.http import HttpClient

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _in_a_folder(_context: click.Context, _parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a file that could not be made, before anything runs."""
    if path is not None and not os.access(path.absolute().parent, os.W_OK):
        raise click.BadParameter(f"no file can be made in the folder {path.absolute().parent}")
    return path


_OUT = click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    callback=_in_a_folder,
    help="Write the saved tensors as safetensors.",
)
_NO_TENSORS = (2).to_bytes(8, "little") + b"{}"


@command()
@click.argument("graph", type=_FILE, metavar="GRAPH.json")
@click.option(
    "--pool", metavar="NAME", shell_complete=pool_names, help="The pool; else the one that holds the graph's model."
)
@click.option("--input", "tensors", type=_FILE, metavar="FILE", help="The graph's tensor constants, as safetensors.")
@NEEDS
@click.option("--exclusive", is_flag=True, help="Share no forward with other requests.")
@PRIORITY
@click.option(
    "--idempotency-key",
    metavar="TEXT",
    help="Run it once: under the same key, it is the request that is there already.",
)
@_OUT
@pass_app
def run(
    app: App,
    /,
    *,
    graph: Path,
    pool: str | None,
    tensors: Path | None,
    idempotency_key: str | None,
    out: Path | None,
    **sending: Any,
) -> None:
    """Run a stored graph on a pool.

    Prints the saved values as JSON; tensors among them are named there and written with --out.
    """
    frame = pack(graph.read_bytes(), _safetensors(tensors) if tensors else _NO_TENSORS)
    client = app.client(pool=pool, patience=WHILE_WAITING)
    request = request_id(client, idempotency_key)
    client.put(request_path(request, pool, **sending), frame, RequestStatus, timeout=600)
    _finish(app, client, check_completed(wait_for_request(client, request, program=app.program)), out)


@command()
@click.argument("request", metavar="ID", shell_complete=waiting_requests)
@pass_app
def wait(app: App, request: str) -> None:
    """Wait for a request to end.

    The exit code says how: 0 where it has completed, else that of its error.
    """
    client = app.client(patience=WHILE_WAITING)
    status = check_completed(wait_for_request(client, check_request_id(request), program=app.program))
    app.answer(status, lambda: print(f"{request} {status.state.lower()}"))


@command()
@click.argument("request", metavar="ID", shell_complete=request_ids)
@_OUT
@pass_app
def result(app: App, request: str, out: Path | None) -> None:
    """Print or write what a request has saved, once it has completed.

    Values are printed as JSON; tensors among them are named there and written with --out. Ask as often as you like.
    """
    client = app.client(patience=WHILE_WAITING)
    status = client.get(f"/v1/requests/{check_request_id(request)}", RequestStatus)
    if status.kind != "run":
        raise InvalidInput(
            f"request {request} is a dump, whose result is a dataset", next="nnsight-hpc fetch copies it"
        )
    _finish(app, client, check_completed(wait_for_request(client, request, program=app.program)), out)


@command()
@click.argument("request", metavar="ID", shell_complete=waiting_requests)
@pass_app
def cancel(app: App, request: str) -> None:
    """Cancel a request."""
    status = decode(app.client().call("DELETE", f"/v1/requests/{check_request_id(request)}"), RequestStatus)
    app.answer(
        status,
        lambda: print(f"{request} {status.state.lower()}{'' if status.state.ended else ': it is being cancelled'}"),
    )


def _safetensors(path: Path) -> bytes:
    """The file's bytes, after a look at its header (safetensors: 8 bytes of length, then JSON)."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length or data[8:9] != b"{":
        raise InvalidInput("not a safetensors file", where=str(path))
    return data


def _finish(app: App, client: HttpClient, status: RequestStatus, out: Path | None) -> None:
    header, block = unpack(fetch_result(client, status.id))
    if out is not None:
        write_atomically(out, bytes(block), mode=0o666)
        note(f"Wrote {size(len(block))} of tensors to {out}.")
    elif len(block) > len(_NO_TENSORS):
        note(f"{size(len(block))} of tensors were not written: {app.program} result {status.id} --out FILE")
    values: Any = json.loads(header)
    app.answer(
        {"request": status, "values": values, "out": None if out is None else str(out)},
        lambda: print(json.dumps(values, indent=2)),
    )
