"""The nodes of the cluster's partitions, as sinfo lists them: nodes that are alike in one line."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from nnsight_hpc.slurm.batch.command import run
from nnsight_hpc.slurm.batch.options import time_limit
from nnsight_hpc.wire.errors import InvalidInput, Unreachable

_SEPARATOR = "\x1f"
_COUNTED = re.compile(r"(?P<kind>.+?)[:=](?P<number>\d+)(?P<unit>[KMGT]?)\Z", re.ASCII)
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_FORMAT = _SEPARATOR.join(("%P", "%l", "%s", "%D", "%c", "%m", "%G", "%f"))


@dataclass(frozen=True)
class Nodes:
    """Some nodes of a partition that are alike; what nobody can read is None, and then allows everything.

    Attributes
    ----------
    time
        The partition's time limit as Slurm writes it, and in seconds (None: there is none).
    most
        How many nodes a job may have there.
    memory
        Bytes of one node.
    gres
        What one node has, as ``{"gpu:a100": 4}``; things without a type by their name alone.
    """

    partition: str
    default: bool
    time: str
    seconds: int | None
    most: int | None
    count: int
    cpus: int | None
    memory: int | None
    gres: dict[str, int]
    features: frozenset[str]

    def has(self, wanted: str) -> int:
        """How many of a kind of GRES a node has, ``gpu`` or ``gpu:a100``; without a type, of all types together."""
        return sum(number for kind, number in self.gres.items() if wanted in (kind, kind.partition(":")[0]))


class _Row(NamedTuple):
    """A line of sinfo, in the order of `_FORMAT`."""

    partition: str
    time: str
    sizes: str
    number: str
    cpus: str
    memory: str
    gres: str
    features: str

    def nodes(self) -> Nodes:
        megabytes = _number(self.memory)
        return Nodes(
            partition=self.partition.removesuffix("*"),
            default=self.partition.endswith("*"),
            time=self.time,
            seconds=_seconds(self.time),
            most=_number(self.sizes.rpartition("-")[2]),
            count=int(self.number),
            cpus=_number(self.cpus),
            memory=None if megabytes is None else megabytes << 20,
            gres=_gres(self.gres),
            features=frozenset(self.features.split(",")) - {"(null)"},
        )


def list_nodes() -> list[Nodes]:
    """All partitions that there are, also hidden ones; nothing where sinfo gives no answer that can be read."""
    try:
        answer = run("sinfo", "--all", "--exact", "--noheader", f"--format={_FORMAT}")
    except Unreachable:
        return []
    parts = [line.split(_SEPARATOR) for line in answer.out.splitlines()]
    if answer.code or any(len(part) != len(_Row._fields) or not part[3].isdecimal() for part in parts):
        return []
    return [_Row(*part).nodes() for part in parts]


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() else None


def _seconds(time: str) -> int | None:
    with suppress(InvalidInput):
        return time_limit(time)
    return None


def _gres(text: str) -> dict[str, int]:
    """``gpu:a100:4(S:0-1),nvme:1`` as numbers by kind; sockets and the like are left out."""
    found: dict[str, int] = {}
    for item in re.sub(r"\([^)]*\)|:no_consume", "", text).split(","):
        kind, number = counted(item)
        found[kind] = found.get(kind, 0) + number
    found.pop("", None)
    return found


def counted(item: str) -> tuple[str, int]:
    """``gpu:a100:4`` as ``gpu:a100`` and 4; ``400G`` has Slurm's unit, and what has no number is one."""
    match = _COUNTED.match(item)
    return (match["kind"], int(match["number"]) << _SHIFTS[match["unit"]]) if match else (item, 1)
