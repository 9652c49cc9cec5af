"""Names that people give to pools and datasets: safe as a file, a URL part and a Slurm job name."""

from __future__ import annotations

import re
import secrets

from nnsight_hpc.wire.errors import InvalidInput

NAME, REQUEST = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", r"r-[a-z0-9]{12}"
"""Regular expressions of a whole name, and of the id of a request."""


def check_name(name: str, *, of: str) -> str:
    """`name`, or `InvalidInput`: letters, digits, dot, underscore and hyphen, 64 at most, first a letter or digit."""
    if not re.fullmatch(NAME, name):
        raise InvalidInput(
            f"{name!r} cannot be the name of a {of}",
            next="use letters, digits, '.', '_' and '-', at most 64, and begin with a letter or a digit",
        )
    return name


def new_request_id() -> str:
    """A fresh request id, made by the client: sending the same id twice makes one request (an idempotency key)."""
    alphabet = "abcdefghijkmnpqrstuvwxyz23456789"
    return "r-" + "".join(secrets.choice(alphabet) for _ in range(12))


def is_request_id(name: str) -> bool:
    return re.fullmatch(REQUEST, name) is not None


def check_request_id(request: str) -> str:
    if not is_request_id(request):
        raise InvalidInput(f"{request!r} is not the id of a request", why="ids look like r-abcdefgh2345")
    return request


def part_id(dump: str, replica: str) -> str:
    """The id of what `replica` does for a dump that another one has."""
    return f"{dump}/{replica}"


def dump_of(lease: str) -> str:
    """The dump that a lease belongs to: itself, or the one that it is a part of."""
    return lease.partition("/")[0]
