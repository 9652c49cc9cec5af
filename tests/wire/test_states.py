import pytest

from nnsight_hpc.wire.errors import Conflict
from nnsight_hpc.wire.states import REPLICA_MOVES, REQUEST_MOVES, EndCause, ReplicaState, RequestState, move


@pytest.mark.parametrize("table", [REQUEST_MOVES, REPLICA_MOVES])
def test_every_state_can_end(table):
    """From every state some ended state can be reached, so nothing waits for ever by design."""
    for start in table:
        reached, waiting = set(), [start]
        while waiting:
            state = waiting.pop()
            reached.add(state)
            waiting += [s for s in table[state] if s not in reached]
        assert any(state.ended for state in reached), start


def test_table_names_every_state():
    """The tables of moves have one row for each state."""
    assert set(REQUEST_MOVES) == set(RequestState)
    assert set(REPLICA_MOVES) == set(ReplicaState)


def test_ended_request_stays_ended():
    """A completed request cannot run again, and the message says what would be allowed."""
    with pytest.raises(Conflict, match=r"request r-1 is COMPLETED and cannot become RUNNING"):
        move(RequestState.COMPLETED, RequestState.RUNNING, of="request r-1")


def test_staying_is_allowed():
    """A report that repeats the state is no move."""
    assert move(ReplicaState.READY, ReplicaState.READY, of="replica a") is ReplicaState.READY


def test_planned_ends_are_nobodys_fault():
    """Every cause is somebody's decision, nobody's fault, or a failure, and what was planned is no failure."""
    planned = {cause for cause in EndCause if cause.expected}
    blameless = {cause for cause in EndCause if cause.blameless}
    assert planned < blameless
    assert set(EndCause) - blameless == {EndCause.OUT_OF_MEMORY, EndCause.LOST, EndCause.CRASHED}
