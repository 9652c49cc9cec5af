"""What crosses a process border, as msgspec structures in JSON: their base, and those about models, requests and datasets.

Those about pools are in `pools`, those between the daemon and its workers in `workers`. Unknown fields are refused in what
people write (`pools.PoolSpec`) and ignored in what programs exchange, so that a newer side may add fields. Times are seconds
since the epoch; sizes are bytes.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import msgspec

from nnsight_hpc.wire.errors import ErrorReport, InvalidInput
from nnsight_hpc.wire.states import RequestState

PROTOCOL = 7
"""Version of everything in this package; both sides refuse another one."""
PRIORITIES = range(-100, 101)
"""Of a user's own requests the one with the larger goes first."""
LISTED, MOST_LISTED = 100, 1000
"""How many requests of each kind a list has where nothing is said, and at most."""

DatasetFormat = Literal["zarr", "hdf5"]

T = TypeVar("T")


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages."""


class ModelIdentity(Message, frozen=True):
    """Which weights: two models are the same exactly when their fingerprints are."""

    id: str
    fingerprint: str = ""
    revision: str | None = None


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


class Event(Message, frozen=True):
    """Something that happened to a pool or a request, in words; `replica` where it was one."""

    time: float
    text: str
    replica: str = ""


class Story(Message, frozen=True):
    """All that is known of a pool or a request, the oldest first, and how it stands in one sentence."""

    now: str
    events: tuple[Event, ...] = ()


class RequestStatus(Message, frozen=True):
    """One request. `times` has the moment of each state it has been in; `kind` is ``run`` or ``dump``.

    While it is queued: `position` is how many would go before it as things stand, `starts` when it may start (None: not
    known), and `waits_for` says in words where no replica of its pool serves. `needs` are the seconds that it takes at
    least, as far as known: its sender said so, or an attempt was cut off. `paused`: its user has stopped it for now.
    """

    id: str
    kind: str
    pool: str
    state: RequestState
    user: str
    times: dict[str, float] = {}
    position: int | None = None
    starts: float | None = None
    error: ErrorReport | None = None
    result_bytes: int = 0
    progress: DumpProgress | None = None
    note: str = ""
    waits_for: str = ""
    needs: float = 0.0
    paused: bool = False


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
    """How far a dump is; what is not known yet is 0.

    While it runs: `speed` is how many tokens a second its `workers` write together. Of one that has ended, `seconds` is how
    long its last attempt took.
    """

    documents: int = 0
    documents_total: int = 0
    tokens: int = 0
    tokens_total: int = 0
    bytes: int = 0
    bytes_total: int = 0
    seconds: float = 0.0
    speed: float = 0.0
    workers: int = 0


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
    """What to dump of a corpus, which follows as JSON lines ``{"id": …, "text": …}`` or ``{"id": …, "tokens": […]}``.

    Either `captures` are points of the model: a module path with ``*`` for any one part, and ``.output`` or ``.input``
    (``model.layers.*.output``). Or `graph` is an intervention graph as JSON, run on one batch after the other, whose saves
    are what is kept; its tensor constants are the first `tensor_bytes` of what follows, as safetensors. `dtype` is how
    floating-point values are stored (``auto``: as the model computes them).

    `context` is the largest number of tokens that the model is given at once. Of longer documents the first ones are kept;
    with a `stride` all of them, in windows that begin so many tokens apart; `packed` joins all documents and cuts them
    there. `measure`: write nothing, and answer with a `DumpPlan`.
    """

    name: str
    captures: tuple[str, ...] = ()
    graph: str = ""
    tensor_bytes: int = 0
    dtype: str = "auto"
    format: DatasetFormat = "zarr"
    context: int = 1024
    stride: int = 0
    packed: bool = False
    batch_tokens: int = 2048
    corpus_fingerprint: str = ""
    command: str = ""
    measure: bool = False


class CapturePlan(Message, frozen=True):
    """A value that a dump would keep: a row for each ``token`` or ``document``, of `width_shape` numbers of `dtype`."""

    name: str
    rows: str
    width_shape: tuple[int, ...]
    dtype: str
    bytes: int


class DumpPlan(Message, frozen=True):
    """What a dump would write, found out without writing.

    `padding` is its share in all that the model would be given. `files` and `bytes` are those of the whole dataset, and
    `free` the bytes that its file system has left for this user. `seconds` is how long it would take at the speed of its
    first batch, whose `batch_tokens` (padding counted) took `batch_seconds`, as long as the disk keeps up.
    """

    documents: int
    tokens: int
    padding: float
    captures: tuple[CapturePlan, ...]
    files: int
    bytes: int
    free: int
    seconds: float
    batch_tokens: int
    batch_seconds: float


class DatasetStatus(Message, frozen=True):
    """A dataset, or what is there of one. `bytes` are those of its finished files; `request` is what writes it."""

    name: str
    path: str
    complete: bool
    request: RequestStatus | None = None
    bytes: int = 0
    tokens: int = 0
    documents: int = 0
    captures: tuple[str, ...] = ()
    created: float = 0.0


class DatasetFile(Message, frozen=True):
    """One file of a dataset, for transfer: its path below the dataset, its size and its CRC-32C (RFC 3720)."""

    path: str
    size: int
    crc32c: int


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
