"""The remote backend's care for what it has sent."""

import pytest

from nnsight_hpc.client.backend import _cancelled_on_interrupt
from nnsight_hpc.client.session import connect
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.states import RequestState


def test_ctrl_c_cancels_the_request(server):
    """And stays what it is for the script."""
    status = RequestStatus(id="r-abcdefgh2345", kind="run", pool="smol", state=RequestState.RUNNING, user="alice")
    server.requests[status.id] = status
    with pytest.raises(KeyboardInterrupt), _cancelled_on_interrupt(connect("local"), status.id):
        raise KeyboardInterrupt
    assert server.requests[status.id].state == RequestState.CANCELLED


def test_ctrl_c_before_the_request_arrived_is_ctrl_c(server):
    """That there is nothing to cancel yet does not hide it."""
    with pytest.raises(KeyboardInterrupt), _cancelled_on_interrupt(connect("local"), "r-abcdefgh2345"):
        raise KeyboardInterrupt
