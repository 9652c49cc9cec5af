"""The messages between the daemon and its workers."""

from __future__ import annotations

import msgspec

from nnsight_hpc.wire.errors import ErrorReport
from nnsight_hpc.wire.messages import PROTOCOL, DumpProgress, Message, ModelIdentity
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import EndCause, ReplicaState

SMALL_FRAME = 64 << 10
"""Bytes of a request, and of a result, up to which they travel and are kept with what is said of them, and not in a file."""


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
    """One request handed to one worker: its bytes, or where they lie, where its result is to be written, how large it may be.

    `frame` are the bytes of a small one. A result that is not small is written to `result` by the worker to whom the daemon
    has confirmed the lease (``/w1/held``); a small one comes with the `Outcome`. Requests with the same `batch`, if not
    empty, may run in one forward; they were handed out together. One of the kind ``part`` helps with a dump that another
    worker has (`names.dump_of` its id): it writes the slices that it is given.
    """

    id: str
    kind: str
    attempt: int
    request: str
    result: str
    user: str
    result_bytes: int | None = None
    batch: str = ""
    frame: bytes = b""


class Begun(Message, frozen=True):
    """A leased request runs now."""

    id: str
    attempt: int


class Outcome(Message, frozen=True):
    """How a leased request ended: it has a result (`error` is None), or it failed; of a dump, how far it came.

    `result` is a result of at most `SMALL_FRAME` bytes; a larger one has been written. `seconds` is what it cost: of a
    forward that several requests shared, its share. `gave_way`: a dump has stopped, as it was told, and is to go on later.
    """

    id: str
    attempt: int
    error: ErrorReport | None = None
    result: bytes = b""
    result_bytes: int = 0
    cancelled: bool = False
    gave_way: bool = False
    seconds: float = 0.0


class SlicesOpened(Message, frozen=True):
    """What a worker has found of a dump that it begins to write: how many slices there are, and which are written.

    `progress` counts what is written, and all that there is to write.
    """

    slices: int
    written: tuple[int, ...]
    progress: DumpProgress


class SliceProgress(Message, frozen=True):
    """How much of one slice its worker has written, and at how many tokens a second.

    At the slice's end there are the `overflows`: values that became infinite in the dataset's dtype, by capture; and how many
    tokens were run for it, without and with padding.
    """

    slice: int
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    speed: float = 0.0
    overflows: dict[str, int] = msgspec.field(default_factory=dict)
    run_tokens: int = 0
    padded_tokens: int = 0


class SliceAsk(Message, frozen=True):
    """A worker asks for a slice: the one that it has `written`, if any, and the one that it has begun and would keep."""

    written: SliceProgress | None = None
    begun: int | None = None


class SliceGiven(Message, frozen=True):
    """The slice that a worker is to write; None: all are written or with others.

    `complete`: all are written, with these `overflows` and this share of `padding` in what was run. `leave`: this worker is
    not needed for the dump any more. Not `known`: the daemon was started anew, and is to be told first what is written.
    """

    slice: int | None = None
    complete: bool = False
    leave: bool = False
    known: bool = True
    overflows: dict[str, int] = msgspec.field(default_factory=dict)
    padding: float = 0.0


class EndRecord(Message, frozen=True):
    """Why a worker ended, in its own words; also written beside its log, for when no daemon listens."""

    replica: str
    cause: EndCause
    detail: str = ""
    time: float = 0.0
