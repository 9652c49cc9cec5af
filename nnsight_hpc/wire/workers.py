"""The messages between the daemon and its workers."""

from __future__ import annotations

from nnsight_hpc.wire.errors import ErrorReport
from nnsight_hpc.wire.messages import PROTOCOL, DumpProgress, Message, ModelIdentity
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import EndCause, ReplicaState


class WorkerHello(Message, frozen=True):
    """The first message of a worker: who it is. `replica` is the id that its job was submitted with."""

    replica: str
    job_id: str
    host: str
    pid: int
    ranks: int
    protocol: int = PROTOCOL
    version: str = ""


class WorkerWelcome(Message, frozen=True):
    """The daemon's answer: what the worker is to serve, and where requests, results and datasets lie."""

    pool: PoolSpec
    requests_folder: str
    datasets_folder: str
    epoch: int


class WorkerReport(Message, frozen=True):
    """A worker's heartbeat: its state, how much of the weights is loaded, the model once it is, and what it runs.

    `free` is how many bytes one request may need beside the model, as the worker has found when it became ready.
    """

    replica: str
    state: ReplicaState
    loaded: int = 0
    total: int = 0
    free: int = 0
    model: ModelIdentity | None = None
    running: tuple[str, ...] = ()
    ends: float | None = None


class Orders(Message, frozen=True):
    """What the daemon wants of a worker: to drain, to give up these requests, to let others go before these dumps."""

    drain: bool = False
    cancel: tuple[str, ...] = ()
    give_way: tuple[str, ...] = ()


class Lease(Message, frozen=True):
    """One request handed to one worker: where its bytes lie, where its result is to be written, how large it may be.

    Requests with the same `batch`, if not empty, may run in one forward; they were handed out together.
    """

    id: str
    kind: str
    attempt: int
    request: str
    result: str
    user: str
    result_bytes: int | None = None
    batch: str = ""


class Begun(Message, frozen=True):
    """A leased request runs now."""

    id: str
    attempt: int


class Outcome(Message, frozen=True):
    """How a leased request ended: its result has been written (`error` is None), or it failed; of a dump, how far it came.

    `seconds` is what it cost: of a forward that several requests shared, its share. `gave_way`: a dump has stopped, as it
    was told, and is to go on later.
    """

    id: str
    attempt: int
    error: ErrorReport | None = None
    result_bytes: int = 0
    cancelled: bool = False
    gave_way: bool = False
    seconds: float = 0.0
    progress: DumpProgress | None = None


class EndRecord(Message, frozen=True):
    """Why a worker ended, in its own words; also written beside its log, for when no daemon listens."""

    replica: str
    cause: EndCause
    detail: str = ""
    time: float = 0.0
