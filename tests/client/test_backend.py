"""The remote backend's care for what it has sent."""

import contextlib
import io

import pytest
import torch

from nnsight_hpc import NNsight
from nnsight_hpc.client import backend, config, waiting
from nnsight_hpc.client.backend import RemoteBackend, _cancelled_on_interrupt
from nnsight_hpc.client.session import connect
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.states import RequestState
from tests.client.program import once, pool


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


@pytest.fixture
def model():
    return NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def traced(model, **options):
    """A forward on the pool `smol`, sent and not waited for."""
    with model.trace(torch.ones(1, 2), remote=True, pool="smol", blocking=False, **options) as tracer:
        model.output.save()
    return tracer


def test_a_trace_says_how_it_is_to_run(server, model):
    """How long it needs, that it shares no forward, its priority; without a word, nothing is said of it."""
    pool(server)
    traced(model, needs="1h30m")
    traced(model, exclusive=True, priority=100)
    traced(model)
    assert server.queries == [
        {"pool": "smol", "needs": "5400"},
        {"pool": "smol", "exclusive": "1", "priority": "100"},
        {"pool": "smol"},
    ]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"needs": "long"}, "needs cannot be 'long'"),
        ({"priority": 101}, "priority cannot be 101"),
        ({"priority": 0.5}, "priority cannot be 0.5"),
        ({"idempotency_key": ""}, "cannot be empty"),
    ],
)
def test_a_trace_that_says_nonsense_is_refused(server, model, wrong, words):
    """Before anything is sent."""
    pool(server)
    with pytest.raises(InvalidInput, match=words):
        traced(model, **wrong)
    assert server.bodies == {}


def test_one_key_is_one_request_of_one_user(server, model):
    """Whatever process sends it again; another key, and another user's same key, are other requests."""
    pool(server)
    ids = [traced(model, idempotency_key=key).request.id for key in ("sweep-3/17", "sweep-3/17", "sweep-3/18")]
    server.user = "bob"
    ids.append(traced(model, idempotency_key="sweep-3/17").request.id)
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


def test_a_trace_goes_to_the_cluster_of_its_pools_definition(slurm_server, sshd, environment, model):
    """And is found there again, without a word about it in the script."""
    config.add("uni", sshd.profile("paramiko", environment=environment))
    path = config.config_file()
    path.write_text(f'{path.read_text()}\n[pool.smol]\ncluster = "uni"\nmodel = "m"\n')
    pool(slurm_server)
    request = traced(model).request
    assert [*slurm_server.requests] == [request.id]
    assert request.status().id == request.id


@pytest.mark.parametrize("blocking", [True, False])
def test_who_waits_is_told_for_what(server, model, blocking, monkeypatch):
    """A script's log learns why its request is queued, once, however the script waits for it."""
    for module in (waiting, backend):
        monkeypatch.setattr(module, "FIRST_POLL", 0.1)
    pool(server)
    server.waits_for = "job 17 waits: behind jobs of higher priority"
    server.hold.clear()
    told, calls = "queued on smol: job 17 waits: behind jobs of higher priority\n", server.calls
    graph, here = traced(model).graph, RemoteBackend(pool="smol")
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        once(lambda: told in shown.getvalue(), lambda: once(_more(calls, 5), server.hold.set))
        if blocking:
            assert "echo" in here.run(graph, {}, model)
        else:
            assert here.submit(graph, {}, model).wait().state == RequestState.COMPLETED
    assert shown.getvalue().count(told) == 1


def _more(calls, count):
    """Whether there were so many more calls since."""
    before = len(calls)
    return lambda: len(calls) >= before + count
