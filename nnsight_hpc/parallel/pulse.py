"""Whether this process works: has it used a core, or read or written files, since it was last asked?"""

from __future__ import annotations

import resource
import time

_SHARE = 0.05
"""A main thread that hangs (a lock, a file server) leaves under 1 % of a core to the other threads of its process; one that
computes, or waits for its GPU, uses a whole one, or a fair share of one where cores are oversubscribed."""


class Pulse:
    """Looks at the counters that the kernel keeps for this process; a microsecond a look."""

    def __init__(self) -> None:
        self._time, self._cpu, self._transfers = 0.0, 0.0, 0

    def beats(self) -> bool:
        """Whether the process worked since the last call."""
        usage, now = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        cpu, transfers = usage.ru_utime + usage.ru_stime, usage.ru_inblock + usage.ru_oublock + usage.ru_majflt
        worked = cpu - self._cpu > _SHARE * (now - self._time) or transfers > self._transfers
        self._time, self._cpu, self._transfers = now, cpu, transfers
        return worked
