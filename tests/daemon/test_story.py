"""What has happened to pools and requests, as it is told to those who ask."""

from __future__ import annotations

import asyncio
import time

import pytest

from nnsight_hpc.daemon.database import take_over
from nnsight_hpc.daemon.store import Store
from nnsight_hpc.daemon.story import Stories
from nnsight_hpc.wire.errors import ErrorReport, NotFound
from nnsight_hpc.wire.messages import Story
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import Status
from nnsight_hpc.wire.states import EndCause
from nnsight_hpc.wire.workers import EndRecord, Outcome
from tests.daemon.process import send, wait_for


def _texts(story: Story) -> list[str]:
    return [event.text for event in story.events]


def test_events_are_told_in_their_order_and_the_oldest_are_forgotten(tmp_path):
    """Nobody waits for the disk, yet whoever reads next finds all; 500 of a subject stay, and others lose none to it."""

    async def scenario():
        store = Store(take_over(places_at(tmp_path), 1), lambda: None)
        stories = Stories(store)
        stories.tell("pool:b", "alone", "b-1")
        for number in range(510):
            stories.tell("pool:a", f"event {number}")
        found = [await stories.of(subject) for subject in ("pool:a", "pool:b", "pool:c")]
        await store.close()
        return found

    many, one, none = asyncio.run(scenario())
    assert [event.text for event in many] == [f"event {number}" for number in range(10, 510)]
    assert [(event.text, event.replica) for event in one] == [("alone", "b-1")]
    assert none == []
    assert abs(one[0].time - time.time()) < 60


def test_a_request_tells_who_had_it_and_why_it_was_taken_back(daemon_with):
    """Each lease and each loss with its replica and its time, and at the end how it stands."""
    daemon = daemon_with(retry=0.05)
    daemon.up()
    http, first, name = daemon.people(), daemon.worker(), new_request_id()
    send(http, name)
    first.started(first.lease())
    first.post("/w1/end", EndRecord(replica=first.replica, cause=EndCause.OUT_OF_MEMORY, detail="rank 0 was killed"))
    second = wait_for(lambda: daemon.worker() if daemon.newest().id != first.replica else None)
    story = http.get(f"/v1/requests/{name}/story", Story)
    assert story.now == "it waits for its turn"
    lease = second.lease()
    second.outcome(Outcome(id=name, attempt=lease.attempt, error=ErrorReport("ExecutionFailed", "no such index")))
    story = http.get(f"/v1/requests/{name}/story", Story)
    user = http.get("/v1/status", Status).hello.user
    taken, *_ = [event for event in story.events if event.text.startswith("taken back")]
    assert (taken.replica, "rank 0 was killed" in taken.text, taken.text.endswith("queued again")) == (
        first.replica,
        True,
        True,
    )
    told = [event.text for event in story.events if event != taken]
    assert told == [
        f"queued for pool smol by {user}",
        "given to a worker, attempt 1",
        "it runs",
        "given to a worker, attempt 2",
        "failed: no such index",
    ]
    assert [event.replica for event in story.events] == [
        "",
        *[first.replica] * 3,
        *[second.replica] * 2,
    ]
    assert [event.time for event in story.events] == sorted(event.time for event in story.events)
    assert story.now == "it has failed: no such index"


def test_a_pools_story_goes_on_after_a_restart_and_stays_when_the_pool_has_gone(daemon_with):
    """From the first submission to the end of its last replica; of a name that never was a pool there is none."""
    daemon = daemon_with()
    daemon.up()
    replica = daemon.worker().replica
    before = daemon.people().get("/v1/pools/smol/story", Story)
    assert before.now == "replicas: 1 wanted, 1 serving; requests: 0 waiting, 0 running"
    assert {event.replica for event in before.events} >= {replica}
    daemon.kill()
    daemon.start()
    after = daemon.people().get("/v1/pools/smol/story", Story)
    assert after.events[: len(before.events)] == before.events
    daemon.people().call("DELETE", "/v1/pools/smol")
    wait_for(lambda: not daemon.people().get("/v1/status", Status).pools)
    gone = daemon.people().get("/v1/pools/smol/story", Story)
    assert gone.now == "there is no pool smol any more"
    assert len(gone.events) > len(before.events)
    assert any("ended" in text for text in _texts(gone))
    with pytest.raises(NotFound, match="no pool other"):
        daemon.people().get("/v1/pools/other/story", Story)
    with pytest.raises(NotFound, match="no request"):
        daemon.people().get(f"/v1/requests/{new_request_id()}/story", Story)
