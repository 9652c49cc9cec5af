"""What can be decided about a pool; the reconciler carries it out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from nnsight_hpc.daemon.records import Replica
    from nnsight_hpc.wire.states import EndCause


class Submit(NamedTuple):
    """One more job: the successor of `succeeds`, where one is named, which begins at `begin` at the earliest."""

    succeeds: str = ""
    begin: float | None = None


class Release(NamedTuple):
    """A replica is to end with this cause; one that serves finishes what it runs first, for a while if it is to `hurry`."""

    replica: Replica
    cause: EndCause
    reason: str
    hurry: bool = True


class Cancel(NamedTuple):
    """The job of a replica that was told to end is to be ended now."""

    replica: Replica


class Lose(NamedTuple):
    """A replica is given up: nothing is heard of it."""

    replica: Replica
    reason: str


Step: TypeAlias = Submit | Release | Cancel | Lose
