"""Small things in words, for notes, stories and reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.wire.states import EndCause

if TYPE_CHECKING:
    from nnsight_hpc.wire.pools import ReplicaStatus

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))
_ENDS = {
    EndCause.DRAINED: "ended as it was told",
    EndCause.IDLE: "was released",
    EndCause.WALLTIME: "came to the end of its walltime",
    EndCause.PREEMPTED: "was preempted",
    EndCause.NODE_FAILED: "ran on a node that failed",
    EndCause.OUT_OF_MEMORY: "ran out of memory",
    EndCause.CANCELLED: "was ended by a signal: somebody cancelled it, or the batch system did",
    EndCause.LOST: "was not heard any more",
    EndCause.CRASHED: "ended by itself",
    EndCause.NOT_SUBMITTED: "was not submitted",
}


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h``: rounded to what a person would say."""
    for size, unit in _UNITS:
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def ended_words(status: ReplicaStatus) -> str:
    """How a replica has ended."""
    cause = f" ({status.cause.words})" if status.cause else ""
    return f"ended{cause}: {status.reason}" if status.reason else f"ended{cause}"


def cause_words(cause: EndCause) -> str:
    return f"it {_ENDS[cause]}"


def loaded_words(status: ReplicaStatus) -> str:
    """How far it is with its weights, as far as that is known."""
    if not status.total:
        return "its worker loads the model"
    return f"its worker loads the model: {_size(status.loaded)} of {_size(status.total)}"


def _size(number: float) -> str:
    exponent = min(4, max(0, (len(str(int(number))) - 1) // 3))
    return f"{number / 1000**exponent:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"
