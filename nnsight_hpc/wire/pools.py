"""Pools as people describe and see them: what is wanted, what there is, and what `plan`, `logs` and `gc` answer."""

from __future__ import annotations

from typing import Literal

from nnsight_hpc.wire.durations import seconds_of
from nnsight_hpc.wire.errors import ErrorReport, InvalidInput
from nnsight_hpc.wire.messages import Hello, Message, ModelIdentity, RequestStatus
from nnsight_hpc.wire.states import EndCause, ReplicaState


class Policy(Message, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What requests may do with a pool's model; what is not given is allowed.

    `read` and `set` are paths of modules with ``*`` for any one part; each stands for all that is below it too, and ``*``
    alone for the whole model. `parameters`: whether weights may be read. `result_bytes`: the most that a request returns.
    """

    read: tuple[str, ...] = ("*",)
    set: tuple[str, ...] = ("*",)
    parameters: bool = True
    result_bytes: int | None = None


class PoolSpec(Message, frozen=True, forbid_unknown_fields=True):
    """Desired state of a pool: a model, the resources of one replica, how many there are to be.

    ``replicas`` is a number, or ``least:most``; between these the pool follows its queue, and what is idle for ``idle``
    (``30m``, ``2h``) is released. ``succession`` says when the next job of a replica is submitted: so that it serves before
    the walltime ends (``overlap``), or after the former has ended (``gap``), where a site allows one job at a time.
    ``factory`` (``package:function``) makes a module of the owner's own, whose safetensors weights are ``model``.
    ``node_cache`` is a folder on the nodes' own disks where the weights are kept for the next start.

    ``tp`` is the degree of tensor parallelism: how many MPI ranks a replica has in all, on ``nodes`` nodes; ``replicated``
    has each of them hold the whole of a model that cannot be split. Memory and GPUs are for a node, CPUs for a rank.
    ``time`` is in Slurm's form (``days-hours:minutes:seconds``); ``mem`` too (``16G``). ``request_memory`` is how many
    bytes one request may need beside the model; None: what the worker has free.
    """

    name: str
    model: str
    revision: str | None = None
    dtype: str = "auto"
    factory: str | None = None
    replicas: int | str = 1
    idle: str | None = None
    succession: Literal["overlap", "gap"] = "overlap"
    policy: Policy | None = None
    node_cache: str | None = None
    nodes: int = 1
    tp: int = 1
    replicated: bool = False
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

    @property
    def ranks_per_node(self) -> int:
        """How many ranks a node has at most; where the nodes do not divide them, the last has fewer."""
        return -(-self.tp // self.nodes)

    @property
    def least(self) -> int:
        """How many replicas there are to be when nobody asks for anything; raises `InvalidInput`."""
        return self._range()[0]

    @property
    def most(self) -> int:
        """How many replicas there may be; raises `InvalidInput`."""
        return self._range()[1]

    @property
    def idle_seconds(self) -> float | None:
        """After how long an idle replica above `least` is released; None: never. Raises `InvalidInput`."""
        return None if self.idle is None else seconds_of(self.idle, key="idle")

    def _range(self) -> tuple[int, int]:
        low, colon, high = str(self.replicas).partition(":")
        numbers = [low, high] if colon else [low, low]
        if all(number.isascii() and number.isdigit() for number in numbers):
            least, most = map(int, numbers)
            if least <= most and most >= 1:
                return least, most
        raise InvalidInput(
            f"replicas cannot be {self.replicas!r}",
            next="give a number of at least 1, or least:most, as 0:3",
        )


class ReplicaStatus(Message, frozen=True):
    """One replica. `reason` says in words what it waits for, or why it ended; `loaded`/`total` are bytes of weights,
    `free` is how many one request may need beside them.

    `begins` is when a waiting job starts, as far as Slurm knows or was told; `position` is its place among the waiting jobs of
    its partition, the first is 1. `started` is when the job began to run, `ready` when it could serve, `ends` when its
    walltime does. `succeeds` is the replica whose place it is to take. `tail`: the last lines of the log of a failed one.
    """

    id: str
    pool: str
    state: ReplicaState
    job_id: str = ""
    host: str = ""
    reason: str = ""
    cause: EndCause | None = None
    loaded: int = 0
    total: int = 0
    free: int = 0
    submitted: float = 0.0
    changed: float = 0.0
    begins: float | None = None
    position: int | None = None
    started: float | None = None
    ready: float | None = None
    ends: float | None = None
    succeeds: str = ""
    log: str = ""
    tail: str = ""


class PoolStatus(Message, frozen=True):
    """A pool and its replicas, the newest last. `held` says why no more replicas are started, when none are.

    `desired` is how many replicas there are to be now, without successors; `down`: the pool is being taken down.
    `gpu_seconds` is what it has used so far. `note` says in words what the whole pool waits for, if it waits.
    """

    spec: PoolSpec
    desired: int
    down: bool = False
    replicas: tuple[ReplicaStatus, ...] = ()
    model: ModelIdentity | None = None
    queued: int = 0
    held: ErrorReport | None = None
    gpu_seconds: float = 0.0
    note: str = ""


class Plan(Message, frozen=True):
    """What `up` would submit for a pool, without doing it.

    `script` is the text of the job, which also lies at `path`: submitted by hand it gives a worker that joins the pool.
    `starts` is Slurm's own estimate of the start; `notes` are what a reader should know (what was not checked, and why).
    """

    spec: PoolSpec
    script: str
    path: str
    starts: float | None = None
    notes: tuple[str, ...] = ()


class LogPart(Message, frozen=True):
    """A part of a replica's log; `next` is the byte where to read on, `ended`: nothing will follow."""

    replica: str
    text: str
    next: int
    ended: bool = False


class Garbage(Message, frozen=True):
    """Jobs of ours that belong to no pool, and folders, of replicas and of datasets, that nobody needs any more."""

    jobs: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


class Status(Message, frozen=True):
    hello: Hello
    pools: tuple[PoolStatus, ...] = ()
    requests: tuple[RequestStatus, ...] = ()
