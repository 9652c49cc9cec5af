"""What a daemon can be set to: every limit and every period in one place, with its unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnsight_hpc.wire.places import Places


@dataclass(frozen=True, kw_only=True)
class Config:
    """Times are in seconds, sizes in bytes."""

    executor: str
    """``slurm`` or ``embedded``."""
    places: Places

    lease_touch: float = 15.0
    lease_stale: float = 90.0
    """A lease that was not touched for so long, by the file server's clock, may be taken over."""

    socket_look: float = 5.0
    """Between two looks at whether the socket for people is still there."""

    silence: float = 60.0
    """A worker that does not name a request it holds for so long has lost it: the request is queued again."""
    attempts: int = 3
    """How often a request is handed out before it fails because its workers end."""

    poll_moving: tuple[float, float] = (30.0, 60.0)
    """Between two questions to the executor, at least and at most, while a replica starts or ends."""
    poll_quiet: tuple[float, float] = (30.0, 60.0)
    """The same while nothing does."""
    ask_after: float = 2.0
    """How soon after a job was submitted or ended the executor is asked: somebody waits for the answer."""
    starts: int = 3
    """A pool whose replicas end so often in a row before one is ready is held."""
    retry: float = 2.0
    """Before a replica is submitted again; doubled for each failure in a row."""
    drain: float = 60.0
    """How long a replica may take to finish what it holds before its job is cancelled."""

    frame_bytes: int = 4 << 30
    """The largest request or corpus."""
    queued_per_user: int = 10_000


def config_for(executor: str, places: Places) -> Config:
    """The usual configuration; to ask the embedded executor costs next to nothing, to ask Slurm does."""
    if executor == "embedded":
        return Config(executor=executor, places=places, poll_moving=(0.5, 1.0), poll_quiet=(5.0, 10.0), ask_after=0.2)
    return Config(executor=executor, places=places)
