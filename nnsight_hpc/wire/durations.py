"""Durations as people write them: ``90s``, ``30m``, ``1h30m``, ``2d``."""

from __future__ import annotations

import re

from nnsight_hpc.wire.errors import InvalidInput

_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_FORM = re.compile(r"(?:\d+[dhms])+\Z", re.ASCII)


def seconds_of(text: str, *, key: str) -> float:
    """A duration in seconds; raises `InvalidInput`, which names the `key` it was given for."""
    if not _FORM.match(text):
        raise InvalidInput(f"{key} cannot be {text!r}", next="write a duration as 90s, 30m, 1h30m or 2d")
    return float(sum(int(number) * _SECONDS[unit] for number, unit in re.findall(r"(\d+)([dhms])", text)))
