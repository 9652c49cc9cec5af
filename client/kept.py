"""Connections to daemons that stay open between the requests of a program: to open one takes longer than a small request.

Each serves one thread at a time. One that was idle for long is not used again: the daemon closes it soon, and where the
machine was asleep nothing may be at its other end. A child process has none of its parent's.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.client import config
from nnsight_hpc.client.session import connect
from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.places import places

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from nnsight_hpc.client.patience import PatientClient

IDLE = 60.0
"""Seconds by the wall clock, which counts a laptop's sleep; the daemon closes what was idle for 75."""


class _Idle(NamedTuple):
    client: PatientClient
    since: float

    @property
    def fresh(self) -> bool:
        return 0 <= time.time() - self.since < IDLE


class _Kept:
    """The idle connections of this process, by where they lead."""

    def __init__(self) -> None:
        self._idle: dict[Hashable, list[_Idle]] = defaultdict(list)
        self._lock = Lock()

    def take(self, key: Hashable) -> PatientClient | None:
        """The one that was used last, if it may be used; those that are too old are closed."""
        with self._lock:
            idle = self._idle[key]
            old = [one for one in idle if not one.fresh]
            self._idle[key] = [one for one in idle if one.fresh]
            found = self._idle[key].pop().client if self._idle[key] else None
        for one in old:
            one.client.close()
        return found

    def give(self, key: Hashable, client: PatientClient) -> None:
        with self._lock:
            self._idle[key].append(_Idle(client, time.time()))


_kept = _Kept()


def _forget() -> None:
    global _kept  # noqa: PLW0603 - the parent's connections, and a lock that one of its threads may hold
    _kept = _Kept()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def kept_connection(cluster: str | None = None, *, patience: float = 0.0) -> Iterator[PatientClient]:
    """As `session.connect`; it is closed where the block is left in the middle of an answer, and else kept."""
    profiles = config.load()
    name = profiles.chosen(cluster)
    key = name, profiles.find(name), places("embedded").home
    client, whole = _kept.take(key) or connect(cluster), False
    client.begin(patience)
    try:
        yield client
        whole = True
    except HpcError:  # the daemon's, in a whole answer; a connection that was lost has been closed
        whole = True
        raise
    finally:
        if whole:
            _kept.give(key, client)
        else:
            client.close()
