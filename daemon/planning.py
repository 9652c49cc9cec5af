"""What `up` would submit for a pool: written down, with the batch system's own estimate, and not submitted."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from nnsight_hpc.daemon.records import new_replica_id
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.messages import encode
from nnsight_hpc.wire.pools import Plan

if TYPE_CHECKING:
    from nnsight_hpc.slurm.batch.executor import Executor
    from nnsight_hpc.wire.places import Places
    from nnsight_hpc.wire.pools import PoolSpec


def plan(spec: PoolSpec, note: str, executor: Executor, places: Places) -> Plan:
    """The plan of one replica. Its folder has all that its worker needs, so a person may submit the script.

    Raises what `Executor.script` and `Executor.estimate` raise, and leaves nothing then.
    """
    replica = new_replica_id(spec.name)
    folder = places.replica(replica)
    folder.mkdir(mode=0o700, parents=True)
    try:
        script = executor.script(replica, spec, places)
        write_atomically(folder / "script", script.encode())
        write_atomically(folder / "job.json", encode(spec))
        starts, words = executor.estimate(replica, spec, places)
    except BaseException:
        shutil.rmtree(folder)
        raise
    notes = tuple(filter(None, (note, words)))
    return Plan(spec=spec, script=script, path=str(folder / "script"), starts=starts, notes=notes)
