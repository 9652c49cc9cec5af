"""Looks at the links of the chain from a person to a forward on a worker, and what they have found."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import ErrorReport, HpcError
from nnsight_hpc.wire.messages import Message

if TYPE_CHECKING:
    from collections.abc import Callable


class Finding(StrEnum):
    WORKS = "works"
    DOUBTFUL = "doubtful"  # it works, but something is odd, or it will not work for long
    BROKEN = "broken"
    SKIPPED = "skipped"  # there is nothing to look at


class Check(Message, frozen=True, omit_defaults=True):
    """`found` in words; `error` says of a doubtful or broken link where, why, and how to mend it."""

    link: str
    finding: Finding
    found: str
    seconds: float = 0.0
    error: ErrorReport | None = None


class Doubt(HpcError):
    """Raised by a look at something that works, but."""


def checked(link: str, look: Callable[[], str]) -> Check:
    """What `look` says of a link, or the `HpcError` that it raises."""
    begun = time.monotonic()
    try:
        finding, found, error = Finding.WORKS, look(), None
    except HpcError as raised:
        finding = Finding.DOUBTFUL if isinstance(raised, Doubt) else Finding.BROKEN
        found, error = raised.what, raised.report()
    return Check(link=link, finding=finding, found=found, error=error, seconds=time.monotonic() - begun)
