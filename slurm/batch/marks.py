"""How a job of ours is known to be ours: its comment names the replica and, by a hash, the home of the daemon."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnsight_hpc.wire.places import Places

_MARK = re.compile(r"nnsight-hpc replica (?P<replica>\S+) home (?P<home>[0-9a-f]{8})\Z")


def mark(replica: str, places: Places) -> str:
    """The comment of a replica's job."""
    return f"nnsight-hpc replica {replica} home {_digest(places)}"


def marked(comment: str, places: Places) -> str | None:
    """The replica whose job has this comment, if it is one of this home."""
    match = _MARK.match(comment)
    return match["replica"] if match and match["home"] == _digest(places) else None


def _digest(places: Places) -> str:
    return hashlib.sha256(str(places.home).encode()).hexdigest()[:8]
