"""How a result gets to the daemon: a small one with its outcome, a larger one in a file.

Before a file is written, the daemon confirms that this worker has this attempt, from its disk. A lease that its daemon had not
written down when it was killed is not known to the next one, which may give the same attempt to another worker: what the
two say is told apart by who says it, but they would write one file.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.workers import SMALL_FRAME, Lease, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_WRITERS = 8
"""Threads that write results: a file system takes its time for each."""


class Ending:
    """A lease that has ended, on its way to the daemon; `refused` is why it does not count, once that is known."""

    def __init__(self, lease: Lease, outcome: Outcome) -> None:
        self.lease, self.outcome = lease, outcome
        self.refused: HpcError | None = None
        self.is_large = len(outcome.result) > SMALL_FRAME

    def write(self) -> None:
        """Put the result into its file; where there is no room for it, that is how the request ended."""
        path, size = Path(self.lease.result), len(self.outcome.result)
        try:
            write_atomically(path, self.outcome.result)
        except OSError as error:
            failure = HpcError(
                f"the result ({size} bytes) could not be written",
                where=str(path),
                why=str(error),
                next="free space there, or save less",
            )
            self.outcome = msgspec.structs.replace(self.outcome, error=failure.report(), result_bytes=0)
        self.outcome = msgspec.structs.replace(self.outcome, result=b"")

    def withdraw(self) -> None:
        """Nobody wants the result."""
        if self.is_large and not self.outcome.result:
            Path(self.lease.result).unlink(missing_ok=True)


class Returns:
    """Writes those results that do not travel with their outcomes.

    Parameters
    ----------
    confirm
        Returns once the daemon has the lease on its disk; raises the `HpcError` for which it does not count.
    """

    def __init__(self, confirm: Callable[[Lease], None]) -> None:
        self._confirm = confirm
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="results")

    def place(self, ended: Iterable[tuple[Lease, Outcome]]) -> list[Ending]:
        """These, ready to be told; what is large is in its file, where the daemon still wants it."""
        endings = [Ending(lease, outcome) for lease, outcome in ended]
        self._write([ending for ending in endings if ending.is_large])
        return endings

    def _write(self, endings: Sequence[Ending]) -> None:
        for ending in endings:
            try:
                self._confirm(ending.lease)
            except HpcError as error:
                ending.refused = error
        for _ in self._writers.map(Ending.write, [ending for ending in endings if ending.refused is None]):
            pass
