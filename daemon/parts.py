"""The parts of a running daemon, as the HTTP interfaces see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.daemon.admission import Share
    from nnsight_hpc.daemon.changes import Changes
    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.pools import Pools
    from nnsight_hpc.daemon.reconciler import Reconciler
    from nnsight_hpc.daemon.request_views import RequestViews
    from nnsight_hpc.daemon.requests import Requests
    from nnsight_hpc.daemon.story import Stories
    from nnsight_hpc.slurm.batch.executor import Executor
    from nnsight_hpc.wire.messages import Hello


@dataclass(frozen=True, kw_only=True)
class Parts:
    """`stop` ends the daemon soon; with True it ends all replicas first. `share`: who is let in beside the owner."""

    config: Config
    share: Share | None
    hello: Hello
    changes: Changes
    stories: Stories
    pools: Pools
    requests: Requests
    views: RequestViews
    executor: Executor
    reconciler: Reconciler
    stop: Callable[[bool], None]
