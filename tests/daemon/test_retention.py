"""What ended long ago is forgotten, and nothing else is."""

from __future__ import annotations

import time

from nnsight_hpc.daemon import table
from nnsight_hpc.daemon.database import connect, take_over
from nnsight_hpc.daemon.retention import forget, forget_stories
from nnsight_hpc.daemon.story import record
from nnsight_hpc.wire.errors import NotFound
from nnsight_hpc.wire.messages import DatasetStatus, DumpSpec, Event, RequestStatus
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.states import RequestState
from tests.daemon.process import dump_frame, run_frame, send, wait_for


def test_a_request_is_forgotten_with_its_files(daemon_with):
    """Its row, its story, its result and its log; what waits stays, and so does whose a dataset is."""
    daemon = daemon_with(keep=0.5)
    daemon.up()
    http, worker, (done, waiting, dump) = daemon.people(), daemon.worker(), (new_request_id() for _ in range(3))
    http.put(f"/v1/datasets/kept?pool=smol&request={dump}", dump_frame("kept"), RequestStatus)
    (daemon.places.datasets / "kept.zarr").mkdir()
    worker.finish(worker.lease())
    send(http, done)
    lease = worker.lease()
    worker.http.call("POST", f"/w1/log?id={done}&replica={worker.replica}&attempt=1&at=0", b'{"text":"hello"}\n')
    assert (daemon.places.requests / f"{done}.1.log").exists()
    worker.finish(lease)
    send(http, waiting, frame=run_frame(tokens=10_000))
    wait_for(lambda: _is_forgotten(http, done))
    assert _is_forgotten(http, done, "/story")
    wait_for(lambda: _files(daemon, dump) == [f"{waiting}.request"])  # its files go after its row
    assert http.get("/v1/datasets/kept", DatasetStatus).request.id == dump
    http.call("DELETE", "/v1/datasets/kept")
    wait_for(lambda: _is_forgotten(http, dump))
    assert http.get(f"/v1/requests/{waiting}", RequestStatus).state == RequestState.QUEUED


def _files(daemon, dump: str) -> list[str]:
    """The files of all requests but the dump."""
    return [path.name for path in daemon.places.requests.iterdir() if dump not in path.name]


def _is_forgotten(http, request: str, part: str = "") -> bool:
    try:
        http.call("GET", f"/v1/requests/{request}{part}")
    except NotFound:
        return True
    return False


def test_all_that_is_old_goes_in_parts(tmp_path):
    """However many there are; of several requests for one dataset the newest stays while the dataset is there."""
    places = places_at(tmp_path)
    (places.datasets / "there.zarr").mkdir(parents=True)
    connection = connect(take_over(places, 1))
    connection.execute("BEGIN")
    old, new = ("old", time.time() - 100), ("new", time.time())
    names = [f"{age}-{number}" for age, _ in (old, new) for number in range(600)]
    for age, ended in (old, new):
        for number in range(600):
            _insert(connection, f"{age}-{number}", ended)
    for number, dataset in enumerate(["there", "there", "gone"]):
        _insert(connection, f"dump-{number}", old[1], dataset)
    parts = []
    while rows := forget(connection, time.time() - 50, places.datasets):
        parts.append({row.id for row in rows})
    left = {name for (name,) in connection.execute("SELECT id FROM requests")}
    stories = {name.removeprefix("request:") for (name,) in connection.execute("SELECT subject FROM events")}
    connection.close()
    assert len(parts) > 1
    assert {*names, "dump-0", "dump-1", "dump-2"} == left.union(*parts)
    assert {*names[600:], "dump-1"} == left == stories


def _insert(connection, name: str, ended: float, dataset: str = "") -> None:
    known = {"id": name, "kind": "run", "pool": "p", "state": RequestState.FAILED, "user": "u", "times": {}}
    dump = DumpSpec(name=dataset, captures=()) if dataset else None
    table.insert(connection, **known, fingerprint="", dataset=dataset, dump=dump, ended=ended)
    record(connection, f"request:{name}", Event(time=ended, text="it was"))


def test_stories_of_pools_that_are_no_more_are_forgotten(tmp_path):
    """Those that are keep what happened to them; what happened lately is kept of all."""
    connection = connect(take_over(places_at(tmp_path), 1))
    connection.execute("INSERT INTO pools VALUES ('here', X'')")
    for pool, when in (("here", 1.0), ("gone", 1.0), ("gone", 9.0)):
        record(connection, f"pool:{pool}", Event(time=when, text="it was"))
    forget_stories(connection, 5.0)
    found = connection.execute("SELECT subject, time FROM events ORDER BY sequence").fetchall()
    connection.close()
    assert [tuple(row) for row in found] == [("pool:here", 1.0), ("pool:gone", 9.0)]
