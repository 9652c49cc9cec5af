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

    look: float = 1.0
    """Between two looks at what is known of the pools, in memory, while there are any."""
    poll: tuple[float, float] = (30.0, 45.0)
    """Between two questions to the executor about all jobs, at least and at most."""
    asked: float = 2.0
    """How soon the executor is asked after a person has asked for a pool and its job was submitted."""

    register: float = 600.0
    """A job that runs for so long without its worker having registered is ended."""
    lost: float = 180.0
    """A worker that was silent for so long is given up, and its job ended."""
    lingering: float = 60.0
    """A job that is there so long after its replica ended is cancelled (again)."""
    drain: float = 60.0
    """How long a replica may take to finish what it holds before its job is cancelled."""

    starts: int = 3
    """A pool whose replicas end so often in a row before one is ready is held."""
    retry: float = 2.0
    """Before a replica is submitted again; doubled for each that ended in a row before it could serve."""
    retry_most: float = 120.0

    scale_wait: float = 20.0
    """A request that has waited for so long brings one more replica, where the pool may have one."""
    scale_queue: int = 4
    """More requests in the queue than this for each replica that serves do the same."""
    idle: float = 1800.0
    """After so long without a request a replica is released, where the pool may do with fewer and does not say when."""

    margin: float = 30.0
    """A successor is to be ready so long before its predecessor takes nothing new, if all goes as the last time."""
    begins_soon: float = 30.0
    """A successor that may begin within this time replaces a predecessor that has ended early."""

    frame_bytes: int = 4 << 30
    """The largest request or corpus."""
    queued_per_user: int = 10_000
    running_per_user: int = 1000
    """On how many replicas one user's requests may run at once."""
    result_bytes_per_user: int = 100_000_000_000
    """Of one user's results that are kept the oldest are removed when newer ones need the room."""
    half_life: float = 3600.0
    """In which half of what a user has had of the workers is forgotten."""
    turn: float = 10.0
    """So long a dump may keep a replica from those whose users have had more, and they it."""
    expires: float = 7 * 86400.0
    """A request that has waited for so long expires."""
    keep: float = 30 * 86400.0
    """A request that ended so long ago is forgotten, with its result, its log and its story."""


def config_for(executor: str, places: Places) -> Config:
    """The usual configuration; to ask the embedded executor costs little, to ask Slurm does not."""
    if executor == "embedded":
        return Config(executor=executor, places=places, poll=(5.0, 10.0), asked=0.2, scale_wait=2.0)
    return Config(executor=executor, places=places)
