"""One process of this machine, told apart from a later one that got the same number."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import msgspec


class ProcessId(msgspec.Struct, frozen=True):
    """A process: its number, and its start in clock ticks since boot (``/proc/PID/stat``, field 22; see proc(5))."""

    pid: int
    start: int

    def alive(self) -> bool:
        return identify(self.pid) == self

    def end(self, timeout: float = 120.0) -> None:
        """Kill it, if it still is that very process, and wait until it is gone.

        Raises
        ------
        TimeoutError
            It still exists after `timeout` seconds.
        """
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive():  # the descriptor was opened before: it cannot mean another process
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                if not select.select([descriptor], [], [], timeout)[0]:
                    raise TimeoutError(f"process {self.pid} is still there {timeout:g} s after SIGKILL")
        finally:
            os.close(descriptor)


def identify(pid: int) -> ProcessId | None:
    """The process that has this number now; None where there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else ProcessId(pid, int(fields[19]))
