"""The HTTP interface for people, operation by operation: what `openapi` describes. A test compares it with the routes."""

from __future__ import annotations

from typing import Any, NamedTuple

from nnsight_hpc.daemon.logs import MOST_LINES
from nnsight_hpc.wire.checks import Check
from nnsight_hpc.wire.dashboard import PAGE, Dashboard
from nnsight_hpc.wire.dumps import DatasetCheck, DumpStatus
from nnsight_hpc.wire.messages import (
    LISTED,
    MOST_LISTED,
    PRIORITIES,
    DatasetFile,
    DatasetStatus,
    Hello,
    PoolModel,
    RequestLog,
    RequestStatus,
    Story,
)
from nnsight_hpc.wire.names import NAME, REQUEST
from nnsight_hpc.wire.pools import Garbage, LogPart, Plan, PoolSpec, PoolStatus, Status
from nnsight_hpc.wire.states import RequestState

PARTS: dict[str, dict[str, Any]] = {
    "name": {"type": "string", "pattern": f"^{NAME}$"},
    "id": {"type": "string", "pattern": f"^{REQUEST}$"},
    "file": {"type": "string", "minLength": 1},
    "path": {"type": "string", "minLength": 1},
    "page": {"type": "string", "enum": [*PAGE]},
}
"""The schemas of the parts of paths."""
BYTES, TEXT, DONE, DOCUMENT = "bytes", "text", "done", "document"
"""Bodies that are no message: any bytes; lines of text; an empty object; any object."""


class Parameter(NamedTuple):
    """A parameter of the query."""

    name: str
    schema: dict[str, Any]
    description: str
    required: bool = False


class Operation(NamedTuple):
    """`path` as aiohttp has it, without the patterns of its parts.

    `answer` and `sent` (the body; None: there is none) are messages, lists of messages, or one of the words above.
    """

    method: str
    path: str
    summary: str
    answer: Any
    query: tuple[Parameter, ...] = ()
    sent: Any = None


def _number(name: str, description: str) -> Parameter:
    return Parameter(name, {"type": "number", "minimum": 0}, description)


def _flag(name: str, description: str) -> Parameter:
    return Parameter(name, {"type": "string", "enum": ["0", "1"]}, description)


def _state(description: str) -> Parameter:
    return Parameter("seen", {"type": "string"}, description)


_STATES = "|".join(RequestState)
_WAIT = _number("wait", "Answer as soon as there is news, and after so many seconds at the latest (60 at most).")
_FROM = _number("from", "The byte where to read on: `next` of the answer before.")
_LINES = Parameter("lines", {"type": "integer", "minimum": 0, "maximum": MOST_LINES}, "How many, from the end.")
_POOL = Parameter("pool", PARTS["name"], "The pool that it is for.")
_NEEDS = _number("needs", "Seconds that it takes at least; no replica with less left is given it.")
_PRIORITY = Parameter(
    "priority",
    {"type": "integer", "minimum": PRIORITIES[0], "maximum": PRIORITIES[-1]},
    "Among one's own requests: a larger one goes first.",
)
_DIGEST = Parameter(
    "digest",
    {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    "What the content under this id is known by, a SHA-256; else it is computed.",
)
_LIMIT = Parameter(
    "limit",
    {"type": "integer", "minimum": 0},
    f"So many requests of each kind (what workers have, what goes next, what has ended); {LISTED}, and {MOST_LISTED} at most.",
)
_EXCLUSIVE = _flag("exclusive", "1: it shares no forward with others.")

_DAEMON = (
    Operation("get", "/v1/hello", "Who answers, and whom it takes you for", Hello),
    Operation("get", "/v1/status", "The daemon, its pools, and its requests as /v1/requests", Status, (_LIMIT,)),
    Operation("get", "/v1/log", "The end of the daemon's log, as people read it", TEXT, (_LINES,)),
    Operation(
        "get",
        "/v1/dashboard",
        "What the dashboard shows: pools, the queue and one's own requests, each cut to what goes first",
        Dashboard,
        (_WAIT, Parameter("seen", {"type": "string"}, "Its `version` as known.")),
    ),
    Operation("get", "/v1/dashboard/{page}", "A file of the dashboard's page", BYTES),
    Operation("get", "/v1/checks", "What the daemon finds when it looks at itself and at what it needs", list[Check]),
    Operation("get", "/v1/openapi.json", "This description", DOCUMENT),
    Operation("get", "/metrics", "Measurements, as Prometheus reads them (text format 0.0.4)", TEXT),
    Operation(
        "post",
        "/v1/gc",
        "Cancel jobs that belong to no pool, and remove old folders and what is left of datasets",
        Garbage,
        (_flag("dry", "1: only say which."),),
    ),
    Operation(
        "post", "/v1/stop", "Stop the daemon", DONE, (_flag("workers", "1: end all workers first, and wait for it."),)
    ),
)
_POOLS = (
    Operation("put", "/v1/pools/{name}", "Have a pool as it is described", PoolStatus, sent=PoolSpec),
    Operation(
        "get", "/v1/pools/{name}", "A pool", PoolStatus, (_WAIT, _state("The state of its newest replica as known."))
    ),
    Operation("delete", "/v1/pools/{name}", "End a pool's workers", PoolStatus),
    Operation("delete", "/v1/pools", "End all workers, also those of no pool", Garbage),
    Operation("post", "/v1/pools/{name}/plan", "The job that would be submitted", Plan, sent=PoolSpec),
    Operation("post", "/v1/pools/{name}/resume", "Start a held pool's workers again", PoolStatus),
    Operation("get", "/v1/pools/{name}/story", "What has happened to a pool", Story),
    Operation(
        "get",
        "/v1/pools/{name}/log",
        "A part of a replica's log",
        LogPart,
        (
            _LINES,
            _FROM,
            _WAIT,
            Parameter("replica", {"type": "string"}, "Which one; else the newest that has a log."),
            Parameter("rank", {"type": "integer", "minimum": 0}, "One of its ranks; else all."),
        ),
    ),
    Operation("get", "/v1/pools/{name}/model", "The small files of a pool's model", PoolModel),
    Operation("get", "/v1/pools/{name}/model/{file}", "One of them; honours Range", BYTES),
)
_REQUESTS = (
    Operation(
        "put",
        "/v1/requests/{id}",
        "Send a request: a frame of a graph and its tensors. The same id again changes nothing",
        RequestStatus,
        (_POOL, _NEEDS, _PRIORITY, _EXCLUSIVE, _DIGEST),
        BYTES,
    ),
    Operation(
        "post",
        "/v1/requests/{id}",
        "Send a request as by PUT, and wait for what it says or its end: a frame of a RequestLog and, if small, its result",
        BYTES,
        (_POOL, _NEEDS, _PRIORITY, _EXCLUSIVE, _DIGEST, _WAIT),
        BYTES,
    ),
    Operation(
        "get",
        "/v1/requests",
        "The requests, in the order of their coming: what workers have, what goes next, and what has ended last; or a page",
        list[RequestStatus],
        (
            _LIMIT,
            Parameter(
                "state",
                {"type": "string", "pattern": f"^({_STATES})(,({_STATES}))*$"},
                "A page: the latest `limit` of those in one of these states, with commas between them.",
            ),
            Parameter("before", PARTS["id"], "A page: the latest that came before this request."),
        ),
    ),
    Operation("get", "/v1/requests/{id}", "A request", RequestStatus, (_WAIT, _state("Its state as known."))),
    Operation(
        "get",
        "/v1/requests/{id}/log",
        "What it has said",
        RequestLog,
        (_FROM, _WAIT, _state("Its state as known.")),
    ),
    Operation("get", "/v1/requests/{id}/story", "What has happened to it", Story),
    Operation("get", "/v1/requests/{id}/result", "Its result: a frame of values and tensors; honours Range", BYTES),
    Operation("delete", "/v1/requests/{id}", "Cancel it", RequestStatus),
)
_DATASETS = (
    Operation(
        "put",
        "/v1/datasets/{name}",
        "Have a dataset written: a frame of what to dump, its graph's tensors, and the corpus",
        RequestStatus,
        (
            _POOL,
            Parameter("request", PARTS["id"], "The id of the request.", required=True),
            *(_NEEDS, _PRIORITY, _DIGEST),
        ),
        BYTES,
    ),
    Operation("get", "/v1/datasets", "The datasets", list[DatasetStatus]),
    Operation("get", "/v1/datasets/{name}", "A dataset", DatasetStatus),
    Operation("delete", "/v1/datasets/{name}", "Remove it", DatasetStatus),
    Operation("get", "/v1/datasets/{name}/files", "Its files, with checksums", list[DatasetFile]),
    Operation("get", "/v1/datasets/{name}/files/{path}", "One of them; honours Range", BYTES),
)
_CHECK = Parameter(
    "check", PARTS["name"], "The name of a check, by which it is known when it is asked for.", required=True
)
_DUMPS = (
    Operation("get", "/v1/dumps", "The dumps, each by the newest request of its dataset", list[DumpStatus]),
    Operation("get", "/v1/dumps/{name}", "A dump: how far it is, and who writes which slice", DumpStatus),
    Operation("post", "/v1/dumps/{name}/pause", "Have it wait, after the batches that run", DumpStatus),
    Operation("post", "/v1/dumps/{name}/resume", "Have it go on", DumpStatus),
    Operation(
        "post",
        "/v1/dumps/{name}/verify",
        "Compute the checksums of all files again; asked again with the same name, it waits for that check",
        DatasetCheck,
        (_CHECK, _WAIT, _number("seen", "So many bytes were read when it was last asked.")),
    ),
    Operation(
        "post",
        "/v1/dumps/{name}/repair",
        "Have what a check has found damaged, and what is missing, written again",
        DumpStatus,
        (_CHECK,),
    ),
)
OPERATIONS: tuple[Operation, ...] = (*_DAEMON, *_POOLS, *_REQUESTS, *_DATASETS, *_DUMPS)
