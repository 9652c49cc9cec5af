"""``nnsight-hpc run``, ``requests``, ``wait`` and ``cancel``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from nnsight_hpc.client.app import App, command, note, pass_app
from nnsight_hpc.client.commands.status import print_requests
from nnsight_hpc.client.tables import size
from nnsight_hpc.client.waiting import check_completed, wait_for_request
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.frames import pack, unpack
from nnsight_hpc.wire.messages import RequestStatus, decode
from nnsight_hpc.wire.names import check_name, check_request_id, new_request_id

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
@click.option("--pool", metavar="NAME", help="The pool; else the one that holds the graph's model.")
@click.option("--input", "tensors", type=_FILE, metavar="FILE", help="The graph's tensor constants, as safetensors.")
@_OUT
@pass_app
def run(app: App, graph: Path, pool: str | None, tensors: Path | None, out: Path | None) -> None:
    """Run a stored graph on a pool.

    Prints the saved values as JSON; tensors among them are named there and written with --out.
    """
    block = _safetensors(tensors) if tensors else _NO_TENSORS
    query = urlencode({"pool": check_name(pool, of="pool")} if pool else {})
    request = new_request_id()
    client = app.client()
    client.put(f"/v1/requests/{request}?{query}", pack(graph.read_bytes(), block), RequestStatus, timeout=600)
    _finish(app, client, check_completed(wait_for_request(client, request)), out)


@command()
@pass_app
def requests(app: App) -> None:
    """List requests."""
    found = app.client(start=False).get("/v1/requests", list[RequestStatus])
    app.answer(found, lambda: print_requests(found))


@command()
@click.argument("request", metavar="ID")
@_OUT
@pass_app
def wait(app: App, request: str, out: Path | None) -> None:
    """Wait for a request, and write its result."""
    client = app.client()
    status = check_completed(wait_for_request(client, check_request_id(request)))
    if status.kind == "run":
        _finish(app, client, status, out)
        return
    if out is not None:
        raise InvalidInput(
            f"request {request} is a dump, and has no tensors for --out", next="nnsight-hpc fetch copies its dataset"
        )
    app.answer(status, lambda: print(f"{request} {status.state.lower()}"))


@command()
@click.argument("request", metavar="ID")
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
    header, block = unpack(client.call("GET", f"/v1/requests/{status.id}/result", timeout=600))
    if out is not None:
        write_atomically(out, bytes(block), mode=0o666)
        note(f"Wrote {size(len(block))} of tensors to {out}.")
    elif len(block) > len(_NO_TENSORS):
        note(f"{size(len(block))} of tensors were not written: nnsight-hpc wait {status.id} --out FILE")
    values: Any = json.loads(header)
    app.answer(
        {"request": status, "values": values, "out": None if out is None else str(out)},
        lambda: print(json.dumps(values, indent=2)),
    )
