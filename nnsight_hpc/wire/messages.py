"""The messages between client, daemon and workers, as msgspec structures in JSON.

Unknown fields are refused in what people write (`PoolSpec`) and ignored in what programs exchange, so that a newer side
may add fields. Times are seconds since the epoch; sizes are bytes.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from nnsight_hpc.wire.errors import ErrorReport, InvalidInput
from nnsight_hpc.wire.states import ReplicaState, RequestState

PROTOCOL = 2
"""Version of everything in this package; both sides refuse another one."""

T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages."""


class ModelIdentity(Message, frozen=True):
    """Which weights: two models are the same exactly when their fingerprints are."""

    id: str
    fingerprint: str = ""
    revision: str | None = None


class PoolSpec(Message, frozen=True, forbid_unknown_fields=True):
    """Desired state of a pool: a model, and the resources of one replica. Memory and CPUs are for a node.

    ``time`` is in Slurm's form (``days-hours:minutes:seconds``); ``mem`` too (``16G``). ``request_memory`` is how many
    bytes one request may need beside the model; None: what the worker has free.
    """

    name: str
    model: str
    revision: str | None = None
    dtype: str = "auto"
    replicas: int = 1
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    gres: str | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    request_memory: int | None = None
    time: str = "01:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    mpi: str = "auto"
    setup: tuple[str, ...] = ()
    sbatch_args: tuple[str, ...] = ()


class Hello(Message, frozen=True):
    """What a daemon says of itself; the bridge prints the same before it relays."""

    protocol: int
    version: str
    owner: str
    host: str
    pid: int
    epoch: int
    executor: str
    user: str = ""
    home: str = ""


class ReplicaStatus(Message, frozen=True):
    """One replica. `reason` says in words what it waits for, or why it ended; `loaded`/`total` are bytes of weights."""

    id: str
    pool: str
    state: ReplicaState
    job_id: str = ""
    host: str = ""
    reason: str = ""
    loaded: int = 0
    total: int = 0
    submitted: float = 0.0
    changed: float = 0.0
    ends: float | None = None
    log: str = ""


class PoolStatus(Message, frozen=True):
    """A pool and its replicas, the newest last. `held` says why no more replicas are started, when none are."""

    spec: PoolSpec
    desired: int
    replicas: tuple[ReplicaStatus, ...] = ()
    model: ModelIdentity | None = None
    queued: int = 0
    held: ErrorReport | None = None


class RequestStatus(Message, frozen=True):
    """One request. `times` has the moment of each state it has been in; `kind` is ``run`` or ``dump``."""

    id: str
    kind: str
    pool: str
    state: RequestState
    user: str
    times: dict[str, float] = {}
    position: int | None = None
    error: ErrorReport | None = None
    result_bytes: int = 0
    progress: DumpProgress | None = None
    note: str = ""


class LogLine(Message, frozen=True):
    """What a request has said while it ran: the text (of one `log` or `print`), and the user's line that said it."""

    text: str
    source: str = ""
    time: float = 0.0


class RequestLog(Message, frozen=True):
    """A part of what a request has said, and its status. `next` is where to read on; `complete`: nothing will follow."""

    status: RequestStatus
    lines: tuple[LogLine, ...] = ()
    next: int = 0
    complete: bool = False


class DumpProgress(Message, frozen=True):
    """How far a dump is; what is not known yet is 0."""

    documents: int = 0
    documents_total: int = 0
    tokens: int = 0
    tokens_total: int = 0
    bytes: int = 0
    bytes_total: int = 0
    seconds: float = 0.0


class ModelFile(Message, frozen=True):
    """One of the small files of a model that are not weights; `sha256` in hexadecimal digits."""

    name: str
    size: int
    sha256: str


class PoolModel(Message, frozen=True):
    """What a pool's model is without its weights. The fingerprint is empty until a worker has seen the weights."""

    model: ModelIdentity
    files: tuple[ModelFile, ...] = ()


class DumpSpec(Message, frozen=True, forbid_unknown_fields=True):
    """What to dump: which captures, of a corpus that follows as JSON lines ``{"id": …, "text": …}``.

    `captures` are points of the model: a module path with ``*`` for any one part, and ``.output`` or ``.input``
    (``model.layers.*.output``). `dtype` is how they are stored (``auto``: as the model computes them). `context` is the
    largest number of tokens of a document that are kept.
    """

    name: str
    captures: tuple[str, ...]
    dtype: str = "auto"
    format: str = "zarr"
    context: int = 1024
    batch_tokens: int = 2048
    corpus_fingerprint: str = ""
    command: str = ""


class DatasetStatus(Message, frozen=True):
    name: str
    path: str
    complete: bool
    request: RequestStatus | None = None


class DatasetFile(Message, frozen=True):
    """One file of a dataset, for transfer: its path below the dataset, its size and its CRC-32C (RFC 3720)."""

    path: str
    size: int
    crc32c: int


class Status(Message, frozen=True):
    hello: Hello
    pools: tuple[PoolStatus, ...] = ()
    requests: tuple[RequestStatus, ...] = ()


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
    """A worker's heartbeat: its state, how much of the weights is loaded, the model once it is, and what it runs."""

    replica: str
    state: ReplicaState
    loaded: int = 0
    total: int = 0
    model: ModelIdentity | None = None
    running: tuple[str, ...] = ()
    ends: float | None = None


class Orders(Message, frozen=True):
    """What the daemon wants of a worker: to drain, to give up these requests."""

    drain: bool = False
    cancel: tuple[str, ...] = ()


class Lease(Message, frozen=True):
    """One request handed to one worker: where its bytes lie, and where its result is to be written."""

    id: str
    kind: str
    attempt: int
    request: str
    result: str
    user: str


class Outcome(Message, frozen=True):
    """How a leased request ended: its result has been written (`error` is None), or it failed; of a dump, how far it came."""

    id: str
    attempt: int
    error: ErrorReport | None = None
    result_bytes: int = 0
    cancelled: bool = False
    seconds: float = 0.0
    progress: DumpProgress | None = None


class EndRecord(Message, frozen=True):
    """Why a worker ended, in its own words; also written beside its log, for when no daemon listens."""

    replica: str
    cause: str
    detail: str = ""
    time: float = 0.0


class LeaseRecord(Message, frozen=True):
    """Where the daemon is: the file that bridges and workers read. A larger epoch has taken over from a smaller one."""

    epoch: int
    host: str
    pid: int
    nonce: str
    socket: str
    address: str = ""
    port: int = 0
    certificate: str = ""
    version: str = ""
    started: float = 0.0


def encode(message: msgspec.Struct | list[Any]) -> bytes:
    return msgspec.json.encode(message)


def decode(data: bytes, as_type: type[T], *, what: str = "message") -> T:
    """Read JSON strictly as `as_type`; raises `InvalidInput` that names the field."""
    try:
        return msgspec.json.decode(data, type=as_type)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"not a valid {what}", why=str(error)) from None
