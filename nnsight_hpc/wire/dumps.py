"""The messages about dumps, as people see them: how far one is, who writes which slice, and what is damaged."""

from __future__ import annotations

from nnsight_hpc.wire.messages import Message, RequestStatus


class SliceDoing(Message, frozen=True):
    """A slice that `replica` writes now: so many of its tokens are written, at so many a second."""

    replica: str
    slice: int
    tokens: int
    speed: float


class DumpStatus(Message, frozen=True):
    """A dump: the newest request of its dataset, and how many of its slices are written (0 of 0: it has not begun).

    `leads` is the replica that has it, if one does; others in `doing` help.
    """

    name: str
    path: str
    complete: bool
    request: RequestStatus
    slices: int = 0
    written: int = 0
    leads: str = ""
    doing: tuple[SliceDoing, ...] = ()


class DamagedFile(Message, frozen=True):
    """A file of a dataset that is missing or differs from its checksum, and what lies in it.

    `rows` and `documents` are the first, and one after the last; `slices` are those that write it again (none: tokens and
    documents themselves, which no slice writes).
    """

    path: str
    problem: str
    slices: tuple[int, ...]
    rows: tuple[int, int]
    documents: tuple[int, int]


class DatasetCheck(Message, frozen=True):
    """A check of all checksums of a dataset: so many bytes of `total` are read; once it is `over`, what was found."""

    done: int
    total: int
    over: bool = False
    damage: tuple[DamagedFile, ...] = ()
