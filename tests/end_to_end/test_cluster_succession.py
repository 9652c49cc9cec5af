"""A pool goes on past its walltime: jobs of two minutes, and a client on the laptop that sends a request every 200 ms.

The first succession happens under a living daemon. In the second one the daemon is dead from before the successor starts
until its predecessor has ended, and nobody can start another: what was queued in Slurm before has to do.
"""

import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.pools import ReplicaStatus
from nnsight_hpc.wire.states import EndCause
from tests.end_to_end import latencies
from tests.end_to_end.owner import until
from tests.slurm.worker.graphs import capture_frame

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

WALLTIME = "00:02:00"
POOL = "steady"
_CLIENT = Path(__file__).with_name("steady_client.py")
_HOLD = """
import sys
from pathlib import Path
from nnsight_hpc.client.launch import _alone
with _alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
"""Holds the lock under which a daemon is started on this host, until its input ends."""


@dataclass
class Course:
    """What was seen of a pool in the course of some successions.

    Attributes
    ----------
    replicas
        The last that was known of each, in the order in which they served.
    dead
        From when to when no daemon ran, for each time.
    jobs
        Slurm's last word about the job of each but the last.
    """

    replicas: list[ReplicaStatus] = field(default_factory=list)
    dead: list[tuple[float, float]] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    asked: list[latencies.Asked] = field(default_factory=list)

    def hand_overs(self):
        """From when the successor's job began until the former one had ended, each under a living daemon."""
        pairs = zip(self.replicas, self.replicas[1:], strict=False)
        windows = [(new.started, old.changed) for old, new in pairs]
        return [window for window in windows if not any(_overlap(window, dead) for dead in self.dead)]

    def loads(self):
        """From when a successor's job began until it was ready, each under a living daemon."""
        windows = [(new.started, new.ready) for new in self.replicas[1:]]
        return [window for window in windows if not any(_overlap(window, dead) for dead in self.dead)]

    def touching(self, windows):
        return [one for one in self.asked if any(one.touches(window) for window in windows)]

    def steady(self):
        """Requests of the time in which one replica served and no other one loaded, under a daemon that has settled."""
        unsettled = [(begin, end + 10) for begin, end in self.dead]
        others = {*self.touching(self.hand_overs()), *self.touching(unsettled)}
        loading = [(new.started, new.ready) for new in self.replicas[1:]]
        return [one for one in self.asked if one not in others and one not in self.touching(loading)]


def _overlap(one, other):
    return one[0] <= other[1] and other[0] <= one[1]


@contextmanager
def no_daemon(owner):
    """Kill the daemon, and let nobody start one."""
    hold = owner.cluster.popen(
        "login", [sys.executable, "-c", _HOLD, owner.places.home], stdin=-1, stdout=-1, text=True
    )
    assert hold.stdout.readline() == "held\n"
    owner.kill()
    yield
    hold.communicate()


@contextmanager
def steady_client(laptop, pool, course):
    """Requests every 200 ms, from the laptop, over SSH; what they took is in the course afterwards."""
    frame, out, stop = (laptop.home / name for name in ("frame", "asked.jsonl", "stop"))
    frame.write_bytes(capture_frame())
    stop.unlink(missing_ok=True)
    command = [sys.executable, str(_CLIENT), pool, *map(str, (frame, out, stop))]
    client = laptop.cluster.popen("laptop", command, env={"HOME": str(laptop.home)}, cwd=laptop.home)
    until(lambda: out.exists() and out.read_text(), "the first answer", 120)
    yield
    stop.touch()
    assert client.wait(120) == 0
    course.asked = latencies.read(out)


def successor_of(owner, replica):
    """The replica that is to take the place of another one, once it has a job."""

    def found():
        return next((one for one in owner.pool(POOL).replicas if one.succeeds == replica.id and one.job_id), None)

    return until(found, f"a successor of {replica.id}", 120)


def take_over(owner, course):
    """Wait until the last replica of the course has given way to its successor."""
    old = course.replicas[-1]
    new = successor_of(owner, old)
    until(lambda: owner.replica(POOL, new.id).ready, f"{new.id} being ready", 180)
    course.replicas[-1] = owner.ended(POOL, old.id)
    course.replicas.append(owner.replica(POOL, new.id))


def take_over_without_daemon(owner, course):
    """The same while no daemon runs from before the successor starts until the former one has ended."""
    old = course.replicas[-1]
    new = successor_of(owner, old)
    with no_daemon(owner):
        killed = time.time()
        until(lambda: owner.job_state(old.job_id) not in ("RUNNING", "COMPLETING"), f"the end of job {old.job_id}", 150)
    until(owner.answers, "an answer of the next daemon", 120)
    course.dead.append((killed, time.time()))
    until(lambda: owner.replica(POOL, new.id).ready, f"{new.id} being ready", 120)
    course.replicas[-1] = owner.ended(POOL, old.id)
    course.replicas.append(owner.replica(POOL, new.id))


def left_to(replica):
    """The rest of a replica's walltime, once a new one has more."""
    left = replica.ends - time.time()
    return left if left < 62 else None


@pytest.fixture(scope="module")
def long_request():
    """What becomes of a request that needs longer than the replica has left which serves when it comes."""
    return {}


@pytest.fixture(scope="module")
def course(laptop, owner, tiny, long_request):
    """Two successions under requests; the second one without a daemon."""
    course = Course()
    owner.start()
    owner.up(POOL, model=str(tiny), time=WALLTIME, mem="1G")
    course.replicas.append(owner.serving(POOL))
    with steady_client(laptop, POOL, course):
        left = until(lambda: left_to(owner.serving(POOL)), "a minute of walltime", 120)
        long_request["id"] = owner.send(capture_frame(), POOL, needs=int(left) - 2)
        time.sleep(1)
        long_request["before"] = owner.request(long_request["id"])
        take_over(owner, course)
        long_request["after"] = owner.reached(long_request["id"], "COMPLETED", "FAILED", seconds=120)
        take_over_without_daemon(owner, course)
        time.sleep(5)
    course.jobs = [owner.job_state(replica.job_id) for replica in course.replicas[:-1]]
    return course


def say(course):
    for line in (
        "",
        latencies.in_words("all", course.asked),
        latencies.histogram(course.asked),
        latencies.in_words("steady", course.steady()),
        latencies.in_words("at a hand-over", course.touching(course.hand_overs())),
        latencies.in_words("while no daemon ran", course.touching(course.dead)),
    ):
        print(line)


def test_no_request_fails(course, capsys):
    """Through both successions there is no error, and every result has the same bytes; the latencies are printed."""
    with capsys.disabled():
        say(course)
    assert [one.error for one in course.asked if one.error] == []
    assert len({one.result for one in course.asked}) == 1
    assert len(course.asked) > 200


def test_no_request_waits_for_a_load(course):
    """While the successor loads, most requests take not nearly as long as it does: the former one answers them.

    Most, since a busy machine may stand still for as long as a small model loads.
    """
    loads = course.loads()
    due = [one for one in course.asked if any(begin <= one.due <= end for begin, end in loads)]
    assert latencies.quantile(due, 0.5) < min(end - begin for begin, end in loads) / 2


@pytest.mark.long  # a ratio of two times, for a machine that does nothing else
def test_a_hand_over_is_not_felt(course):
    """In the same time no request takes over 3 times the steady p99."""
    worst = latencies.quantile(course.touching(course.hand_overs()), 1)
    assert worst <= 3 * latencies.quantile(course.steady(), 0.99)


def test_requests_wait_for_the_daemon_only(course):
    """What was under way while no daemon ran is answered soon after its return: a loaded replica was there.

    A worker that has found no daemon for long looks for one every 15 s.
    """
    [(_, back)] = course.dead
    assert max(one.done for one in course.touching(course.dead)) < back + 60


def test_successors_are_in_the_queue_long_before(course):
    """Each successor was submitted before half of the former one's walltime was over, and served before its end."""
    for old, new in zip(course.replicas, course.replicas[1:], strict=False):
        assert new.succeeds == old.id
        assert new.submitted < old.started + 60
    assert course.replicas[1].ready < course.replicas[0].changed


def test_the_former_one_ends_with_success(course):
    """It drains, and Slurm counts its job as completed, whether the daemon or Slurm's signal told it."""
    assert course.jobs == ["COMPLETED", "COMPLETED"]
    assert [one.cause for one in course.replicas[:-1]] == [EndCause.DRAINED, EndCause.DRAINED]


def test_a_successor_loads_without_a_daemon(owner, course):
    """The one that started while no daemon ran says so in its log, and was ready when the daemon came."""
    assert "no daemon answers; loading the model meanwhile" in Path(course.replicas[-1].log).read_text()


def test_a_long_request_waits_for_the_successor(owner, long_request, course):
    """A request that needs more than is left is not started: it waits, says what for, and runs on the next replica."""
    assert long_request["before"].state == "QUEUED"
    assert "left" in long_request["before"].waits_for
    assert long_request["after"].state == "COMPLETED"
    assert course.replicas[1].id in owner.story(f"requests/{long_request['id']}")


def test_a_request_longer_than_the_walltime_is_refused(owner, course):
    """No replica of the pool could ever run it, and the message says so."""
    with pytest.raises(InvalidInput, match="walltime"):
        owner.send(capture_frame(), POOL, needs=300)
