"""The errors that people see, and how they cross a process border.

::

    HpcError
    ├── InvalidInput        what was given is wrong: an argument, a configuration, a corpus
    │   └── InvalidGraph    a graph is refused: structure, an operation that is not allowed, a limit
    ├── NotFound            a pool, a request, a dataset, a file or a model that is not there
    ├── Conflict            a name that exists, a state that does not allow it
    │   └── TakenOver       another writer has this part of a dataset now; a worker's own affair
    ├── Denied              a refused login, an unknown host key, somebody else's request, what a pool's policy forbids
    ├── Unreachable         a host, a daemon or a program on the other side that does not answer
    ├── Incompatible        two sides that speak different versions
    ├── ReplicaFailed       a job that ended before its worker could serve
    ├── ExecutionFailed     an operation of a graph raised while it ran (also an instance of that exception's type)
    ├── RequestCancelled    somebody cancelled the request
    └── CorruptData         bytes that do not match their checksum

Each says what happened, where, why, and what to do next. Over HTTP an error is an `ErrorReport`.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import msgspec

__all__ = [
    "Conflict",
    "CorruptData",
    "Denied",
    "ExecutionFailed",
    "HpcError",
    "Incompatible",
    "InvalidGraph",
    "InvalidInput",
    "NotFound",
    "ReplicaFailed",
    "RequestCancelled",
    "Unreachable",
]


class ErrorReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as data: the class, the parts of its message, and the type that a failed operation raised."""

    kind: str
    what: str
    where: str = ""
    why: str = ""
    next: str = ""
    exception: str = ""


class HpcError(Exception):
    """Base of every error that nnsight-hpc raises on purpose.

    Parameters
    ----------
    what
        What happened, as one sentence without a full stop.
    where
        The user's line, a module path, a job id, a file.
    why
        The cause, as far as it is known; may have several lines (the last lines of a log).
    next
        What the reader can do about it: a command, where there is one.
    """

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, what: str, *, where: str = "", why: str = "", next: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.next = what, where, why, next

    def __str__(self) -> str:
        parts = [self.what]
        parts += [f"  {label}: {_indent(text)}" for label, text in self._labelled() if text]
        return "\n".join(parts)

    def _labelled(self) -> list[tuple[str, str]]:
        return [("where", self.where), ("why", self.why), ("next", self.next)]

    def report(self) -> ErrorReport:
        return ErrorReport(type(self).__name__, self.what, self.where, self.why, self.next)


def _indent(text: str) -> str:
    return text.rstrip("\n").replace("\n", "\n    ")


class InvalidInput(HpcError):
    exit_code = 2
    http_status = 400


class InvalidGraph(InvalidInput):
    http_status = 422


class NotFound(HpcError):
    exit_code = 4
    http_status = 404


class Conflict(HpcError):
    exit_code = 5
    http_status = 409


class TakenOver(Conflict):
    """Another writer has this part of the dataset now. It passes between the ranks of a replica, and reaches no user."""


class Denied(HpcError):
    exit_code = 6
    http_status = 403


class Unreachable(HpcError):
    exit_code = 7
    http_status = 502


class Incompatible(HpcError):
    exit_code = 8
    http_status = 426


class ReplicaFailed(HpcError):
    exit_code = 9
    http_status = 503


class RequestCancelled(HpcError):
    exit_code = 10
    http_status = 410


class CorruptData(HpcError):
    exit_code = 11


class ExecutionFailed(HpcError):
    """An operation of a graph raised while it ran; `exception` names the type that it raised."""

    def __init__(
        self, what: str, *, where: str = "", why: str = "", next: str = "", exception: str = "RuntimeError"
    ) -> None:
        super().__init__(what, where=where, why=why, next=next)
        self.exception = exception

    def __str__(self) -> str:  # the user's line comes first: that is what they look for
        return "\n".join([f"{self.where}", f"  {self.what}", *(f"  {t}" for t in (_indent(self.why), self.next) if t)])

    def report(self) -> ErrorReport:
        return ErrorReport("ExecutionFailed", self.what, self.where, self.why, self.next, self.exception)


_RAISED_AS_THEMSELVES: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)
_KINDS: dict[str, type[HpcError]] = {name: globals()[name] for name in (*__all__, "TakenOver")}


@cache
def execution_error(exception: str) -> type[ExecutionFailed]:
    """The class for an operation that raised `exception`: one that ``except IndexError`` catches too."""
    for base in _RAISED_AS_THEMSELVES:
        if base.__name__ == exception:
            return type(
                exception, (ExecutionFailed, base), {"__module__": __name__, "__str__": ExecutionFailed.__str__}
            )
    return ExecutionFailed


def from_report(report: ErrorReport) -> HpcError:
    """The exception that a report stands for; a kind that this version does not know becomes a plain `HpcError`."""
    if report.kind == "ExecutionFailed":
        cls = execution_error(report.exception)
        return cls(
            report.what,
            where=report.where,
            why=report.why,
            next=report.next,
            exception=report.exception or "RuntimeError",
        )
    return _KINDS.get(report.kind, HpcError)(report.what, where=report.where, why=report.why, next=report.next)
