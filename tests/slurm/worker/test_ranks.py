"""Several ranks as one worker, below a real mpirun: what they serve, and how they end."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from nnsight_hpc.execution.values import unpack_values
from nnsight_hpc.parallel.watchdog import LIMIT
from nnsight_hpc.slurm.batch.embedded import EmbeddedExecutor
from nnsight_hpc.slurm.batch.executor import JobState
from nnsight_hpc.storage import ActivationDataset, read_manifest
from nnsight_hpc.wire.logs import readable
from nnsight_hpc.wire.messages import decode, encode
from nnsight_hpc.wire.places import Places, places_at
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.workers import EndRecord, Orders
from tests.rest import shares_at_rest
from tests.slurm.worker.graphs import IDS, WRONG, capture_frame, dump_frame, endless_frame, sampled_frame, talking_frame
from tests.slurm.worker.stand_in import StandIn, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLOSE = {"rtol": 0, "atol": 1e-5}
"""Sums over ranks are in another order than in one process; values are about 1."""


@dataclass
class Replica:
    """A stand-in daemon, and a job that an executor has started for it."""

    places: Places
    daemon: StandIn
    executor: EmbeddedExecutor
    job: str = ""

    def start(self, spec: PoolSpec) -> None:
        folder = self.places.replica("w1")
        folder.mkdir(parents=True)
        (folder / "job.json").write_bytes(encode(spec))
        self.job = self.executor.submit("w1", spec, self.places)

    def ready(self) -> Replica:
        wait_for(lambda: self.ended() or self._state() == "READY", "a ready worker", 120)
        assert not self.ended(), self.log()
        return self

    def _state(self) -> str:
        return self.daemon.reports[-1].state if self.daemon.reports else ""

    def ended(self) -> bool:
        return self.executor.survey([self.job], self.places).jobs[self.job].state is JobState.ENDED

    def wait(self, seconds: float) -> str:
        """How the job ended, and not later than after so many seconds."""
        wait_for(self.ended, f"the end of the job; its log:\n{self.log()}", seconds)
        return self.executor.survey([self.job], self.places).jobs[self.job].reason

    def log(self) -> str:
        return readable((self.places.replica("w1") / "log").read_text())

    def end_record(self) -> EndRecord:
        return decode((self.places.replica("w1") / "end.json").read_bytes(), EndRecord)

    def session(self) -> list[psutil.Process]:
        """All processes of the job."""
        leader = int(self.job.partition(":")[0])
        return [process for process in psutil.process_iter() if _session_of(process.pid) == leader]

    def wait_empty(self) -> None:
        """Nothing of the job is left."""
        wait_for(lambda: self.session() == [], "the end of all processes", 120)

    def ranks(self) -> dict[int, psutil.Process]:
        """The workers' processes by rank."""
        found = [process for process in self.session() if "nnsight_hpc.slurm.worker" in process.cmdline()]
        return {int(p.environ()["OMPI_COMM_WORLD_RANK"]): p for p in found if "OMPI_COMM_WORLD_RANK" in p.environ()}

    def end(self) -> None:
        if self.job:
            self.executor.cancel(self.job)
            self.wait(120)
        self.daemon.stop()


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


@pytest.fixture(scope="module")
def spec(tiny_llama: Path) -> PoolSpec:
    return PoolSpec(name="tiny", model=str(tiny_llama), tp=2)


def _replica(home: Path, spec: PoolSpec) -> Replica:
    places = places_at(home)
    replica = Replica(places, StandIn(places, spec), EmbeddedExecutor())
    replica.daemon.start()
    return replica


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory, spec: PoolSpec) -> Iterator[Replica]:
    """Two ranks that stay ready for all tests that do not end them."""
    replica = _replica(tmp_path_factory.mktemp("ranks") / "home", spec)
    try:
        replica.start(spec)
        yield replica.ready()
    finally:
        replica.end()


@pytest.fixture
def replica(tmp_path: Path, spec: PoolSpec) -> Iterator[Replica]:
    """A home for ranks that a test ends."""
    replica = _replica(tmp_path / "home", spec)
    yield replica
    replica.end()


@pytest.fixture(scope="module")
def hidden(tiny_llama: Path) -> torch.Tensor:
    """What a plain PyTorch hook sees at the point that `capture_frame` saves, in one process."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    seen = []
    model.model.layers[1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=IDS)
    return seen[0]


def test_a_result_is_that_of_one_process(resident, hidden):
    """The saved value is what a plain hook sees in one process, within rounding; the daemon is told of the ranks."""
    assert [hello.ranks for hello in resident.daemon.hellos] == [2]
    request = resident.daemon.submit(capture_frame())
    assert resident.daemon.outcome(request).error is None
    torch.testing.assert_close(unpack_values(resident.daemon.result(request))["hidden"], hidden, **CLOSE)


@pytest.mark.parametrize(("frame", "kind", "said"), WRONG)
def test_what_is_wrong_with_a_request_is_its_own_error(resident, hidden, frame, kind, said):
    """A request that cannot run is one error, the same as in one process, and the next one is right on all ranks."""
    error = resident.daemon.outcome(resident.daemon.submit(frame())).error
    assert kind == error.kind
    assert said in f"{error.what} {error.why}"
    after = resident.daemon.submit(capture_frame())
    assert resident.daemon.outcome(after).error is None
    torch.testing.assert_close(unpack_values(resident.daemon.result(after))["hidden"], hidden, **CLOSE)


def test_a_model_that_cannot_be_split_is_held_whole_when_asked_for(tmp_path):
    """Values are bit for bit those of one process."""
    folder = tmp_path / "bloom"
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=24, n_layer=2, n_head=2)).eval()
    model.save_pretrained(folder)
    seen = []
    with model.transformer.h[1].register_forward_hook(lambda _m, _a, output: seen.append(output)), torch.no_grad():
        model(input_ids=IDS)
    replica = _replica(tmp_path / "home", spec := PoolSpec(name="bloom", model=str(folder), tp=2, replicated=True))
    try:
        replica.start(spec)
        request = replica.ready().daemon.submit(capture_frame("transformer.h.1"))
        assert replica.daemon.outcome(request).error is None
        assert torch.equal(unpack_values(replica.daemon.result(request))["hidden"][0], seen[0][0])
    finally:
        replica.end()


def test_what_a_request_says_is_said_once(resident):
    """All ranks run the graph, and one of them speaks."""
    request = resident.daemon.submit(talking_frame(3))
    assert resident.daemon.outcome(request).error is None
    assert [f"mean {n}" in line.text for n, line in enumerate(resident.daemon.lines(request))] == [True] * 3


def test_more_than_a_policy_allows_is_not_returned(resident):
    """Neither said nor saved: rank 0 counts, the request fails on all ranks alike, and the next one is served."""
    for frame, limit in ((talking_frame(3), 20), (capture_frame(), 100)):
        error = resident.daemon.outcome(resident.daemon.submit(frame, result_bytes=limit)).error
        assert (error.kind, error.what) == (
            "Denied",
            f"the request returns more than its pool's policy allows: {limit} bytes",
        )
    assert resident.daemon.outcome(resident.daemon.submit(capture_frame(), result_bytes=10_000)).error is None


def test_a_running_request_is_cancelled(resident):
    """An order to cancel stops a request that would take minutes on all ranks, and the next one is served."""
    daemon = resident.daemon
    request = daemon.submit(endless_frame())
    wait_for(lambda: daemon.lines(request), "the first line")
    daemon.orders = Orders(cancel=(request,))
    outcome = daemon.outcome(request)
    daemon.orders = Orders()
    assert (outcome.cancelled, outcome.error) == (True, None)
    assert daemon.outcome(daemon.submit(capture_frame())).error is None


def test_requests_share_a_forward_on_all_ranks(resident):
    """Requests that are given together give what they give alone, each its own, and one that is wrong its own error."""
    before, daemon = resident.log(), resident.daemon
    frames = [capture_frame("model.layers.0"), capture_frame("model.layers.9"), talking_frame(), capture_frame()]
    alone = [daemon.outcome(daemon.submit(frame)) for frame in frames]
    requests = daemon.submit_together(frames)
    together = [daemon.outcome(request) for request in requests]
    assert [outcome.error for outcome in together] == [outcome.error for outcome in alone]
    assert "3 requests shared a forward" in resident.log()[len(before) :]
    for number in (0, 3):
        got, expected = (unpack_values(ended[number].result)["hidden"] for ended in (together, alone))
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    assert len(daemon.lines(requests[2])) == 1


def test_ranks_draw_alike(resident, tiny_llama):
    """Tokens that are drawn are those of one process with that seed; a rank that drew others would break that."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    torch.manual_seed(7)
    expected = model.generate(IDS, max_new_tokens=20, do_sample=True)
    request = resident.daemon.submit(sampled_frame(20, seed=7))
    assert resident.daemon.outcome(request).error is None
    assert torch.equal(expected, unpack_values(resident.daemon.result(request))["tokens"])


@pytest.mark.long
def test_a_stopped_rank_ends_the_job(replica, spec):
    """A rank that is stopped in the midst of a request ends the job when the watchdog's time is over, with the reason."""
    replica.start(spec)
    request = replica.ready().daemon.submit(endless_frame())
    wait_for(lambda: replica.daemon.lines(request), "the first line")
    replica.ranks()[1].send_signal(signal.SIGSTOP)
    replica.wait(1.5 * LIMIT)
    record = replica.end_record()
    assert record.cause == "LOST"
    # which one it is can be said only where it does not stand within a collective
    assert "gave no sign of life" in record.detail or "another rank hangs within it" in record.detail
    replica.wait_empty()


def test_a_dump_is_written_by_all_ranks(resident, tiny_llama):
    """A dump over several batches has the rows that one process has, within rounding; each rank has written files of it."""
    documents = ["the capital of the city is paris", "one two three four", "rome", "berlin is a city in the tower"] * 3
    frame = dump_frame(documents, ("model.layers.*.mlp.output",), batch_tokens=16)
    assert resident.daemon.outcome(resident.daemon.submit(frame, kind="dump"), 120).error is None
    dataset = ActivationDataset(resident.places.datasets / "set.zarr")
    model, seen = AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), []
    model.model.layers[2].mlp.register_forward_hook(lambda _m, _a, output: seen.append(output))
    document = dataset.document(3)
    with torch.no_grad():
        model(input_ids=torch.tensor([document.input_ids.tolist()]))
    rows = torch.tensor(document["model.layers.2.mlp.output"])
    torch.testing.assert_close(rows, seen[0][0], **CLOSE)
    assert dataset.documents == len(documents)
    writers = {entry.writer for entry in read_manifest(dataset.path) if entry.slice is not None}
    assert writers == {f"{os.uname().nodename}:{process.pid}" for process in resident.ranks().values()}


def test_idle_ranks_use_next_to_no_cpu(resident):
    """No process of the job uses 2 % of a core at rest."""
    resident.daemon.wait_state("READY")
    processes = resident.session()
    assert set(resident.ranks()) == {0, 1}
    assert max(shares_at_rest(processes, 0.02)) < 0.02


def test_usr2_drains_all_ranks(replica, spec):
    """A request that runs is finished; then all ranks end in order, and nothing of the job is left."""
    replica.start(spec)
    request, pipe = replica.ready().daemon.submit_held()
    replica.executor.drain(replica.job)
    replica.daemon.wait_state("DRAINING")
    pipe.write_bytes(capture_frame(forwards=60))
    assert replica.wait(120) == "ended with success"
    assert replica.daemon.outcome(request).error is None
    assert replica.end_record().cause == "DRAINED"
    replica.wait_empty()


def test_ranks_of_a_node_share_a_copy(replica, spec, tmp_path, hidden):
    """Both ranks load from the node's own disk, where each file is once; the result is that of one process."""
    replica.start(msgspec.structs.replace(spec, node_cache=str(tmp_path / "disk")))
    replica.ready()
    assert replica.log().count("was copied to this node") + replica.log().count("is already on this node") == 2
    assert len([*(tmp_path / "disk").glob("*/*/*.safetensors")]) == 1
    assert replica.daemon.reports[-1].model.id == spec.model
    request = replica.daemon.submit(capture_frame())
    assert replica.daemon.outcome(request).error is None
    torch.testing.assert_close(unpack_values(replica.daemon.result(request))["hidden"], hidden, **CLOSE)


def test_cancel_ends_all_ranks(replica, spec):
    """A request that runs is given up; the record says that the job was cancelled, and nothing of it is left."""
    replica.start(spec)
    request = replica.ready().daemon.submit(endless_frame())
    wait_for(lambda: replica.daemon.lines(request), "the first line")
    replica.executor.cancel(replica.job)
    replica.wait(120)
    assert not replica.daemon.outcomes[request]
    assert replica.end_record().cause == "CANCELLED"
    assert [record.cause for record in replica.daemon.ends] == ["CANCELLED"]
    replica.wait_empty()


@pytest.mark.parametrize(
    ("busy", "rank"),
    [(True, 1), (False, 0), *(pytest.param(*other, marks=pytest.mark.long) for other in ((True, 0), (False, 1)))],
)
def test_a_killed_rank_ends_the_job_and_is_named(replica, spec, rank, busy):
    """Whoever dies, at rest or in a request: that ends the job, no watchdog has to, and its record says which rank it was."""
    replica.start(spec)
    replica.ready()
    if busy:
        request = replica.daemon.submit(endless_frame())
        wait_for(lambda: replica.daemon.lines(request), "the first line")
    replica.ranks()[rank].send_signal(signal.SIGKILL)
    assert replica.wait(120) != "ended with success"
    assert replica.end_record().cause == "CRASHED"
    assert replica.end_record().detail.startswith(f"rank {rank} on {os.uname().nodename} was killed")
    assert [replica.end_record()] == replica.daemon.ends
    replica.wait_empty()


def test_a_model_that_cannot_be_split_so_is_refused_with_what_fits(replica, spec):
    """The degree is checked before anything is loaded; the record names those that fit."""
    replica.start(msgspec.structs.replace(spec, tp=3))
    replica.wait(180)
    record = replica.end_record()
    assert record.cause == "CRASHED"
    assert "the model cannot be split over 3 ranks" in record.detail
    assert "2" in record.detail.rpartition("numbers of ranks:")[2]
    assert "Traceback" not in replica.log()


def test_a_model_that_is_not_there_is_one_error(replica, spec):
    """It is rank 0 that says so, and all ranks end."""
    replica.start(msgspec.structs.replace(spec, model="/no/such/model"))
    replica.wait(120)
    assert "there is no such folder for a model" in replica.end_record().detail
    assert [replica.end_record()] == replica.daemon.ends[:1]
    assert json.loads((replica.places.replica("w1") / "ranks.json").read_text()) == [os.uname().nodename] * 2
