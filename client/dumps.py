"""How a dump is sent, and how the plan of one is fetched."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import msgspec

from nnsight_hpc.client.results import fetch_result
from nnsight_hpc.client.sending import dump_path, request_id
from nnsight_hpc.graph import Graph
from nnsight_hpc.wire.frames import pack, unpack
from nnsight_hpc.wire.messages import DumpPlan, DumpSpec, RequestStatus, decode, encode

if TYPE_CHECKING:
    from nnsight_hpc.wire.http import HttpClient


def send_dump(
    daemon: HttpClient,
    spec: DumpSpec,
    block: bytes,
    pool: str | None,
    *,
    idempotency_key: str | None = None,
    **sending: Any,
) -> RequestStatus:
    """Send a dump; `block` is what follows the spec. Raises what the daemon says against it.

    Parameters
    ----------
    pool
        Where it is to run; None: the pool with the weights that its graph was made for.
    idempotency_key
        What is sent again under the same key is the dump that is there already.
    sending
        ``needs``, ``priority``: see `client.sending.dump_path`.
    """
    request = request_id(daemon, idempotency_key)
    digest = _digest(spec, block) if idempotency_key is not None else ""
    path = dump_path(spec.name, request, pool, **sending, digest=digest)
    return daemon.put(path, pack(encode(spec), block), RequestStatus, timeout=600)


def _digest(spec: DumpSpec, block: bytes) -> str:
    """Of what is dumped, of which corpus, and how; from which line or command does not matter."""
    graph = Graph.from_json(spec.graph).without_lines().to_json() if spec.graph else ""
    same = msgspec.structs.replace(spec, graph=graph, command="")
    return hashlib.sha256(encode(same) + b"\0" + block).hexdigest()


def fetch_plan(daemon: HttpClient, request: str) -> DumpPlan:
    """What a dump that only measures has found, once it has completed. Loads no torch."""
    header, _ = unpack(fetch_result(daemon, request))
    return decode(decode(header, _Result).values["plan"].encode(), DumpPlan)


class _Result(msgspec.Struct):
    """The header of a result, as far as it is needed here (`execution.values`)."""

    values: dict[str, str]
