"""The files of requests: their bytes, what each attempt said, and the results that workers write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from nnsight_hpc.daemon.table import Row


class RequestFiles:
    """They lie in one folder, each named after its request."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def request(self, request: str) -> Path:
        return self._folder / f"{request}.request"

    def result(self, request: str, attempt: int) -> Path:
        return self._folder / f"{request}.{attempt}.result"

    def log(self, request: str, attempt: int) -> Path:
        return self._folder / f"{request}.{attempt}.log"

    def remove_of_ended(self, row: Row) -> None:
        """Remove what nobody needs of an ended request: its bytes, and results of attempts that lost.

        The bytes of a dump stay, for damaged slices to be written again, until its dataset is removed.
        """
        if not row.dataset:
            self.request(row.id).unlink(missing_ok=True)
        for attempt in range(1, row.attempt + (row.state != RequestState.COMPLETED)):
            self.result(row.id, attempt).unlink(missing_ok=True)

    def remove(self, rows: Iterable[Row]) -> None:
        """Remove all that there is of requests that are forgotten."""
        for row in rows:
            self.request(row.id).unlink(missing_ok=True)
            for attempt in range(1, row.attempt + 1):
                self.result(row.id, attempt).unlink(missing_ok=True)
                self.log(row.id, attempt).unlink(missing_ok=True)

    def remove_unknown(self, known: set[str]) -> None:
        """Requests that were never acknowledged; a result may just be being written, by a worker that outlived us."""
        for path in self._folder.iterdir():
            request, _, rest = path.name.partition(".")
            if request not in known or (rest.startswith("request.") and rest.endswith(".partial")):
                path.unlink(missing_ok=True)
