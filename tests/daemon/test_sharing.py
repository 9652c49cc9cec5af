"""A daemon that several users share: who gets in, who may do what, and that each sees only what is his."""

from __future__ import annotations

import grp
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

import pytest

from nnsight_hpc.daemon.sharing import _FOR_ALL
from nnsight_hpc.wire.errors import Conflict, Denied, InvalidInput, NotFound, Unreachable
from nnsight_hpc.wire.messages import DatasetStatus, Hello, RequestLog, RequestStatus, Story
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.pools import PoolStatus, Status
from nnsight_hpc.wire.states import RequestState
from tests.daemon.others import people_as
from tests.daemon.process import DaemonProcess, dump_frame, send

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="is other users")

MAIL = grp.getgrnam("mail").gr_gid


def shared(base: Path, settings: str) -> DaemonProcess:
    daemon = DaemonProcess(base)
    daemon.places.home.mkdir(parents=True)
    daemon.places.settings.write_text(settings)
    return daemon


@pytest.fixture(scope="module")
def daemon():
    """A daemon that is shared with the users games and man, and the members of the group mail."""
    folder = Path(tempfile.mkdtemp(prefix="d-"))
    with shared(folder, '[share]\nusers = ["games", "man"]\ngroup = "mail"\n') as daemon:
        yield daemon
        daemon.stop()
    shutil.rmtree(folder, ignore_errors=True)


def client(daemon, user, *groups):
    return people_as(Path(daemon.lease().socket), user, *groups)


def test_users_and_members_of_the_group_get_in_and_nobody_else(daemon):
    """Each is greeted by the name that the kernel has for him; others are refused, and that is logged."""
    assert client(daemon, "games").get("/v1/hello", Hello).user == "games"
    assert client(daemon, "www-data", MAIL).get("/v1/hello", Hello).user == "www-data"
    with pytest.raises(Denied, match="does not serve www-data"):
        client(daemon, "www-data").get("/v1/hello", Hello)
    assert "refused GET /v1/hello: this daemon does not serve www-data" in daemon.log()


def test_what_a_user_sends_is_seen_and_ended_by_nobody_else_but_the_owner(daemon, worker):
    """Status, log, story, result, cancelling and sending the same id again are refused to another user."""
    games, man, name = client(daemon, "games"), client(daemon, "man"), new_request_id()
    assert send(games, name).user == "games"
    for method, path in [
        ("GET", ""),
        ("GET", "/log"),
        ("GET", "/story"),
        ("GET", "/result"),
        ("DELETE", ""),
        ("PUT", "?pool=smol"),
    ]:
        with pytest.raises(Denied, match=f"request {name} is somebody else's"):
            man.call(method, f"/v1/requests/{name}{path}", b"" if method == "PUT" else None)
    lease = worker.lease()
    assert lease.user == "games"
    worker.finish(lease, b"what games asked for")
    for http in (games, daemon.people()):
        assert http.get(f"/v1/requests/{name}", RequestStatus).state == RequestState.COMPLETED
        assert http.get(f"/v1/requests/{name}/log", RequestLog).complete
        assert http.get(f"/v1/requests/{name}/story", Story).events
        assert http.call("GET", f"/v1/requests/{name}/result") == b"what games asked for"
    with pytest.raises(Denied):
        man.call("GET", f"/v1/requests/{name}/result")


def test_lists_have_ones_own(daemon, worker):
    """Requests in both lists are the user's; the owner sees all."""
    games, man, owner = client(daemon, "games"), client(daemon, "man"), daemon.people()
    ids = {user: new_request_id() for user in ("games", "man", "root")}
    for http, name in zip((games, man, owner), ids.values(), strict=True):
        send(http, name)
    for user, http in (("games", games), ("man", man)):
        assert {one.user for one in http.get("/v1/requests", list[RequestStatus])} == {user}
        assert {one.user for one in http.get("/v1/status", Status).requests} == {user}
    assert set(ids.values()) <= {one.id for one in owner.get("/v1/requests", list[RequestStatus])}
    assert set(ids.values()) <= {one.id for one in owner.get("/v1/status", Status).requests}
    assert [one.spec.name for one in man.get("/v1/status", Status).pools] == ["smol"]
    owner.call("DELETE", f"/v1/requests/{ids['man']}")
    assert man.get(f"/v1/requests/{ids['man']}", RequestStatus).state == RequestState.CANCELLED
    for http, user in ((games, "games"), (owner, "root")):
        http.call("DELETE", f"/v1/requests/{ids[user]}")


def test_a_dataset_is_its_users_alone(daemon, worker):
    """Another user does not see it in the list, cannot fetch, remove, overwrite or go on with it."""
    games, man, request = client(daemon, "games"), client(daemon, "man"), new_request_id()
    games.put(f"/v1/datasets/d1?pool=smol&request={request}", dump_frame("d1"), RequestStatus)
    worker.finish(worker.lease())
    folder = daemon.places.datasets / "d1.zarr"
    folder.mkdir()
    (folder / "part").write_bytes(b"activations")
    for method, path, body in [
        ("GET", "", None),
        ("GET", "/files", None),
        ("GET", "/files/part", None),
        ("DELETE", "", None),
        ("PUT", f"?pool=smol&request={new_request_id()}", dump_frame("d1")),
        ("PUT", f"?pool=smol&request={new_request_id()}", bytes(32 << 20)),  # more than sockets hold: it is still sent
    ]:
        with pytest.raises(Denied, match="dataset d1 is somebody else's"):
            man.call(method, f"/v1/datasets/d1{path}", body)
    with pytest.raises(Denied, match=f"request {request} is somebody else's"):
        man.call("PUT", f"/v1/datasets/d2?pool=smol&request={request}", dump_frame("d2"))
    assert man.get("/v1/datasets", list[DatasetStatus]) == []
    assert [one.name for one in games.get("/v1/datasets", list[DatasetStatus])] == ["d1"]
    assert games.call("GET", "/v1/datasets/d1/files/part") == b"activations"
    games.call("DELETE", "/v1/datasets/d1")
    with pytest.raises(NotFound):
        man.call("GET", "/v1/datasets/d1")


def test_a_dataset_that_nobody_has_asked_for_is_the_owners(daemon):
    """What was put into the folder by hand, or is older than the database."""
    (daemon.places.datasets / "old.zarr").mkdir()
    games = client(daemon, "games")
    with pytest.raises(Denied, match="dataset old"):
        games.call("GET", "/v1/datasets/old")
    assert games.get("/v1/datasets", list[DatasetStatus]) == []
    assert daemon.people().get("/v1/datasets/old", DatasetStatus).name == "old"
    daemon.people().call("DELETE", "/v1/datasets/old")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/pools/smol"),
        ("DELETE", "/v1/pools/smol"),
        ("DELETE", "/v1/pools"),
        ("POST", "/v1/pools/smol/plan"),
        ("POST", "/v1/pools/smol/resume"),
        ("GET", "/v1/pools/smol/log"),
        ("GET", "/v1/log"),
        ("POST", "/v1/gc"),
        ("POST", "/v1/stop"),
    ],
)
def test_pools_and_the_daemon_are_the_owners_to_command(daemon, worker, method, path):
    """Each is refused in words that name the owner, and nothing happens."""
    with pytest.raises(Denied, match="only root, whose daemon this is, may do that"):
        client(daemon, "games").call(method, path, b"{}" if method != "GET" else None)
    assert daemon.people().get("/v1/pools/smol", PoolStatus).desired == 1


@pytest.mark.parametrize(
    ("route", "method"), [(route, one) for route, all_ in _FOR_ALL.items() for one in sorted(all_)]
)
def test_what_is_open_is_there_and_not_refused(daemon, worker, route, method):
    """A route that is written wrong in the list would be closed, or a line that means nothing."""
    path = re.sub(r"\{\w+\}", "none", route)
    body = b"" if method == "PUT" else None
    try:
        client(daemon, "games").call(method, path, body)
    except (InvalidInput, NotFound) as error:
        said = error.what
    else:
        said = "an answer"
    assert "the daemon has no answer to" not in said


def test_with_a_group_alone_the_kernel_keeps_others_out(base):
    """The socket is the group's; a datasets folder that was open is closed; quotas are each user's own."""
    daemon = shared(base, '[share]\ngroup = "mail"\n[quota]\nqueued = 1\n')
    daemon.places.datasets.mkdir(mode=0o755)
    with daemon:
        path = Path(daemon.lease().socket)
        assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_gid) == (0o660, MAIL)
        assert stat.S_IMODE(daemon.places.datasets.stat().st_mode) == 0o700
        with pytest.raises(Unreachable, match="lost the connection") as caught:
            people_as(path, "games").get("/v1/hello", Hello)
        assert isinstance(caught.value.__cause__, PermissionError)
        daemon.up()
        games, man = (people_as(path, name, MAIL) for name in ("games", "man"))
        send(games, new_request_id())
        with pytest.raises(Conflict, match="games has 1 request"):
            send(games, new_request_id())
        assert send(man, new_request_id()).state == RequestState.QUEUED
        daemon.stop()
