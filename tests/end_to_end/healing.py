"""A daemon of short periods, and what tests of a pool that heals ask."""

from nnsight_hpc.wire.states import ReplicaState
from tests.end_to_end.owner import until
from tests.slurm.worker.graphs import capture_frame

QUICK = {"poll": (3.0, 3.0), "lost": 25.0, "retry": 0.5}
"""It asks Slurm every 3 s, and believes in seconds that a worker is lost."""


def running(owner, pool, *, forwards=1500):
    """A request that takes seconds, and the replica that runs it now; another one where it had ended before that was seen."""
    frame = capture_frame(forwards=forwards)
    while True:
        request = owner.send(frame, pool)
        if replica := runner(owner, pool, request):
            return request, replica


def runner(owner, pool, request):
    """The replica that runs a request, the only one of its pool, as soon as one does; None where it has ended."""

    def found():
        busy, state = owner.replicas(pool, ReplicaState.BUSY), owner.request(request).state
        return [None] if state.ended else state == "RUNNING" and busy

    [replica] = until(found, f"a replica that runs {request}", 180)
    return replica


def is_answered(owner, pool):
    """Whether the pool answers a request now."""
    return owner.reached(owner.send(capture_frame(), pool), "COMPLETED", "FAILED").state == "COMPLETED"
