"""The parts of a running daemon, as the HTTP interfaces see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.daemon.changes import Changes
    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.pools import Pools
    from nnsight_hpc.daemon.reconciler import Reconciler
    from nnsight_hpc.daemon.requests import Requests
    from nnsight_hpc.wire.messages import Hello


@dataclass(frozen=True)
class Parts:
    """`stop` ends the daemon soon; with True it ends all replicas first."""

    config: Config
    hello: Hello
    changes: Changes
    requests: Requests
    pools: Pools
    reconciler: Reconciler
    stop: Callable[[bool], None]
