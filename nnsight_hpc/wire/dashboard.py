"""What the dashboard shows: the daemon as one of its users may see it, small enough to be sent at each change."""

from __future__ import annotations

from nnsight_hpc.wire.messages import Hello, Message
from nnsight_hpc.wire.states import ReplicaState, RequestState

PAGE = {"dashboard.html": "text/html", "dashboard.css": "text/css", "dashboard.js": "text/javascript"}
"""The files of the page, and their content types; all of them are UTF-8."""


class ReplicaView(Message, frozen=True):
    """One replica; the fields are those of `ReplicaStatus`. `cause` is in words, `reason` is one line."""

    id: str
    state: ReplicaState
    job_id: str = ""
    host: str = ""
    reason: str = ""
    cause: str = ""
    loaded: int = 0
    total: int = 0
    free: int = 0
    begins: float | None = None
    position: int | None = None
    ends: float | None = None
    succeeds: str = ""


class PoolView(Message, frozen=True):
    """One pool: how many requests wait and run there, what it waits for in one line, and its replicas."""

    name: str
    model: str
    desired: int
    queued: int
    running: int
    note: str = ""
    replicas: tuple[ReplicaView, ...] = ()


class RequestView(Message, frozen=True):
    """One request, in `state` since `since`.

    While it waits: `before` is how many go before it, `starts_in` the seconds until it may start (None: not known).
    `done` is how much of a dump is done, from 0 to 1. `error`: why it has failed, in one line.
    """

    id: str
    kind: str
    pool: str
    user: str
    state: RequestState
    since: float
    before: int | None = None
    starts_in: float | None = None
    done: float | None = None
    error: str = ""


class UserLoad(Message, frozen=True):
    user: str
    queued: int
    running: int


class Ended(Message, frozen=True):
    """How many requests have ended in the `Dashboard.step` seconds after `time`."""

    time: float
    count: int


class Dashboard(Message, frozen=True):
    """All that the dashboard shows at a time `now` of the daemon's clock.

    `version` is another one when anything else is. `queued` and `running` count the requests of all users. `own` are those
    of the user who asks: what runs, what waits, the latest that have ended. `queue` (what runs and what goes next, of all) and
    `users` are for the daemon's owner alone. Of long lists the beginning is sent. `ended` has no entry where nothing ended,
    and begins `span` seconds ago.
    """

    version: str
    now: float
    daemon: Hello
    owner: bool
    pools: tuple[PoolView, ...]
    queued: int
    running: int
    own_queued: int
    own: tuple[RequestView, ...]
    queue: tuple[RequestView, ...] = ()
    users: tuple[UserLoad, ...] = ()
    step: float = 0.0
    span: float = 0.0
    ended: tuple[Ended, ...] = ()
