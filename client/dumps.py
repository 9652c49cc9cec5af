"""How a dump is sent, and how the plan of one is fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlencode

import msgspec

from nnsight_hpc.client.results import fetch_result
from nnsight_hpc.wire.frames import pack, unpack
from nnsight_hpc.wire.messages import DumpPlan, DumpSpec, RequestStatus, decode, encode
from nnsight_hpc.wire.names import check_name, new_request_id

if TYPE_CHECKING:
    from nnsight_hpc.wire.http import HttpClient


def send_dump(daemon: HttpClient, spec: DumpSpec, block: bytes, pool: str | None) -> RequestStatus:
    """Send a dump; `block` is what follows the spec. Raises what the daemon says against it.

    Parameters
    ----------
    pool
        Where it is to run; None: the pool with the weights that its graph was made for.
    """
    query = {"request": new_request_id()} | ({"pool": check_name(pool, of="pool")} if pool else {})
    path = f"/v1/datasets/{spec.name}?{urlencode(query)}"
    return daemon.put(path, pack(encode(spec), block), RequestStatus, timeout=600)


def fetch_plan(daemon: HttpClient, request: str) -> DumpPlan:
    """What a dump that only measures has found, once it has completed. Loads no torch."""
    header, _ = unpack(fetch_result(daemon, request))
    return decode(decode(header, _Result).values["plan"].encode(), DumpPlan)


class _Result(msgspec.Struct):
    """The header of a result, as far as it is needed here (`execution.values`)."""

    values: dict[str, str]
