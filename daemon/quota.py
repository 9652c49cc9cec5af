"""How many requests a user may have in the queue. They are counted as they come and go: no arrival looks at the others."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import Conflict
from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.daemon.table import Row


class Quota:
    """Hears of each change of a request's state.

    Parameters
    ----------
    most
        Of one user's.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._users: dict[str, str] = {}
        self._counts: Counter[str] = Counter()

    def note(self, row: Row) -> None:
        if row.state == RequestState.QUEUED:
            self._count(row.id, row.user)
        else:
            self.forget(row.id)

    def forget(self, request: str) -> None:
        """It is not in the queue."""
        if user := self._users.pop(request, None):
            self._counts[user] -= 1

    @contextmanager
    def coming(self, request: str, user: str) -> Iterator[Conflict | None]:
        """Counts a request while it is being queued, which may fail; why its user may not have one more, if so."""
        refusal, is_known = self._refusal(user), request in self._users
        self._count(request, user)
        try:
            yield refusal
        except BaseException:
            if not is_known:
                self.forget(request)
            raise

    def _count(self, request: str, user: str) -> None:
        if request not in self._users:
            self._users[request] = user
            self._counts[user] += 1

    def _refusal(self, user: str) -> Conflict | None:
        if (count := self._counts[user]) < self._most:
            return None
        return Conflict(
            f"{user} has {count} requests in the queue, and may not have more",
            next="wait until some have run, or cancel some",
        )
