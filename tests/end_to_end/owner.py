"""alice, who owns the pools: on the login node, with a daemon whose periods a test may shorten.

She speaks to it over the bridge, as a laptop does, but without SSH in between: watching costs next to nothing.
"""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlencode

import psutil

from nnsight_hpc.client.hello import read_hello
from nnsight_hpc.wire.errors import HpcError, NotFound
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import Hello, LeaseRecord, RequestStatus, Story, decode
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolStatus
from tests.end_to_end.slurm_calls import SlurmCalls

WORKER = "nnsight_hpc.slurm.worker"
_PROGRAM = Path(__file__).with_name("quick_daemon.py")
_PATH = f"{Path(sys.prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin"


def until(condition, what, seconds):
    """The first true value of `condition()`; it is asked a few times a second, since the machine has better to do."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not in {seconds} s"
        time.sleep(0.2)
    return value


class Owner:
    """alice's daemon, pools, requests, jobs and processes."""

    def __init__(self, cluster):
        self.cluster, self.calls = cluster, SlurmCalls(cluster)
        self.places = places_at(cluster.home("alice") / ".local/state/nnsight-hpc/slurm")
        self.http = HttpClient(self._open, peer="alice's daemon")

    # -- the daemon ------------------------------------------------------------------------------------------------

    def start(self, **settings):
        """Start a daemon with these fields of its `Config`."""
        command, path = [sys.executable, "-P", _PROGRAM, json.dumps(settings)], f"{self.calls.folder}:{_PATH}"
        with (self.cluster.scratch / "daemon.log").open("ab") as log:
            daemon = self.cluster.popen("login", command, env={"PATH": path}, stdout=log, stderr=log)
        self.daemon = psutil.Process(daemon.pid)
        until(self.answers, "an answer of the daemon", 120)

    def answers(self):
        try:
            return self.http.get("/v1/hello", Hello)
        except HpcError:
            return None

    def kill(self):
        """SIGKILL to whichever daemon has the lease."""
        self.on_login("kill", "-KILL", str(self.lease.pid))
        self.http.close()

    def stop(self):
        """Stop the daemon; workers go on."""
        pid = self.lease.pid
        self.http.call("POST", "/v1/stop")
        self.http.close()
        until(lambda: not self.runs_on_login(pid), "the end of the daemon", 120)

    @property
    def lease(self):
        return decode(self.places.lease.read_bytes(), LeaseRecord)

    @property
    def log(self):
        return (self.cluster.scratch / "daemon.log").read_text()

    def _open(self):
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "nnsight_hpc.client", "bridge", "--no-start"]
            self.cluster.popen("login", command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL)
        read_hello(ours, peer="alice's bridge")
        return ours

    # -- pools -----------------------------------------------------------------------------------------------------

    def up(self, name, **keys):
        """Ask for a pool, as `nnsight-hpc up` does with these keys."""
        body = json.dumps({"name": name, **keys}).encode()
        return decode(self.http.call("PUT", f"/v1/pools/{name}", body), PoolStatus)

    def down(self, name):
        """Take a pool down, and wait for the end of its jobs."""
        self.http.call("DELETE", f"/v1/pools/{name}")
        until(lambda: not self.jobs(f"--name=nnsight-hpc-{name}"), f"the end of pool {name}", 120)

    def pool(self, name):
        return self.http.get(f"/v1/pools/{name}", PoolStatus)

    def replicas(self, name, *states):
        """Replicas of a pool, should it be there, in these states; without: those that have not ended."""
        try:
            found = self.pool(name).replicas
        except NotFound:
            return []
        return [one for one in found if (one.state in states if states else not one.state.ended)]

    def replica(self, name, replica):
        [found] = [one for one in self.pool(name).replicas if one.id == replica]
        return found

    def ended(self, name, replica, seconds=120):
        """A replica once it has ended."""

        def found():
            one = self.replica(name, replica)
            return one if one.state.ended else None

        return until(found, f"the end of {replica}", seconds)

    def serving(self, name, *, but=(), seconds=180):
        """A replica that serves and is none of `but`, as soon as there is one."""

        def found():
            return next((one for one in self.replicas(name) if one.state.serves and one.id not in but), None)

        return until(found, f"a replica of {name} that serves", seconds)

    def settled(self, name):
        """A replica that serves, once its successor waits in Slurm's queue: until then a pool changes by itself."""
        replica = self.serving(name)
        until(lambda: any(one.succeeds == replica.id and one.job_id for one in self.replicas(name)), "a successor", 120)
        return replica

    def story(self, subject):
        """What has happened to a pool (``pools/NAME``) or a request (``requests/ID``), as one text."""
        story = self.http.get(f"/v1/{subject}/story", Story)
        return "\n".join([*(f"{event.replica} {event.text}" for event in story.events), story.now])

    # -- requests --------------------------------------------------------------------------------------------------

    def send(self, frame, pool, **options):
        request = new_request_id()
        self.http.put(f"/v1/requests/{request}?{urlencode({'pool': pool, **options})}", frame, RequestStatus)
        return request

    def request(self, request):
        return self.http.get(f"/v1/requests/{request}", RequestStatus)

    def requests(self):
        return self.http.get("/v1/requests", list[RequestStatus])

    def reached(self, request, *states, seconds=180):
        """A request once it is in one of these states."""

        def found():
            status = self.request(request)
            return status if status.state in states else None

        return until(found, f"{request} in {states}", seconds)

    # -- Slurm, and processes --------------------------------------------------------------------------------------

    def on_login(self, *command, **options):
        return self.cluster.run("login", command, **options).stdout

    def jobs(self, *filters):
        """Ids of alice's jobs that have not ended."""
        return self.on_login("squeue", "--noheader", "--user=alice", "--format=%A", *filters).split()

    def job_state(self, job):
        return self.on_login("squeue", "--noheader", "--states=all", f"--jobs={job},{job}", "--format=%T").strip()

    def runs_on_login(self, pid):
        return self.cluster.run("login", ["kill", "-0", str(pid)], check=False).returncode == 0

    def hold(self, *options, user="bob"):
        """A job that sleeps, submitted with these options; its id."""
        command = ["sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 600", *options]
        return self.on_login(*command, user=user).strip()

    def cancel(self, *jobs):
        self.on_login("scancel", *jobs, user="root")


def ranks_of(replica):
    """The processes of a replica's worker on all nodes, by rank."""
    found = {}
    for process in psutil.process_iter():
        try:
            if {WORKER, replica} <= set(process.cmdline()) and process.name().startswith("python"):
                found[int(process.environ()["SLURM_PROCID"])] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
            continue
    return found


def kill(process):
    process.send_signal(signal.SIGKILL)
    psutil.wait_procs([process], timeout=120)
