"""Requests on a resident worker: results, errors, cancelling, and that nothing of it ends the worker."""

from __future__ import annotations

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from nnsight_hpc.execution.values import unpack_values
from nnsight_hpc.wire.errors import Conflict, NotFound
from nnsight_hpc.wire.frames import pack
from nnsight_hpc.wire.workers import Orders
from tests.devices import DEVICE
from tests.rest import shares_at_rest
from tests.slurm.worker.graphs import IDS, MINUTES, WRONG, capture_frame, dump_frame, endless_frame, operation_frame
from tests.slurm.worker.stand_in import wait_for


@pytest.fixture(scope="module")
def hidden(tiny_llama) -> torch.Tensor:
    """What a plain PyTorch hook sees at the point that `capture_frame` saves."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval().to(DEVICE)
    seen = []
    model.model.layers[1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=IDS.to(DEVICE))
    return seen[0].cpu()


def test_a_worker_says_who_it_is_and_what_it_holds(resident, tiny_llama):
    """It registers under its id, reports the bytes of the weights while it loads, and its model once it is ready."""
    daemon = resident.daemon
    assert {"w1"} == {hello.replica for hello in daemon.hellos}
    assert daemon.hellos[0].pid == resident.processes[0].pid
    ready = next(report for report in daemon.reports if report.state == "READY")
    assert str(tiny_llama) == ready.model.id
    assert len(ready.model.fingerprint) == 32
    assert ready.loaded == ready.total == sum(f.stat().st_size for f in tiny_llama.glob("*.safetensors"))
    states = [report.state for report in daemon.reports]
    assert states[0] == "LOADING"


def test_a_worker_hands_out_its_models_small_files(resident, tiny_llama):
    """Config and tokenizer lie where the daemon finds them, as they are in the model's folder; weights do not."""
    copy = resident.places.model_copy("w1")
    files = {path.name: path.read_bytes() for path in copy.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert files == {name: (tiny_llama / name).read_bytes() for name in files}
    assert not [name for name in files if name.endswith(".safetensors")]


def test_a_result_equals_a_plain_hook(resident, hidden):
    """The saved value is bit for bit what a PyTorch hook sees."""
    request = resident.daemon.submit(capture_frame())
    outcome = resident.daemon.outcome(request)
    assert outcome.error is None
    frame = resident.daemon.result(request)
    assert outcome.result_bytes == len(frame)
    assert outcome.seconds > 0
    assert torch.equal(hidden, unpack_values(frame)["hidden"])


def test_word_of_a_start_comes_before_the_end(resident):
    """A request that runs for more than a moment is told to have begun, and when it comes to its end."""
    request, pipe = resident.daemon.submit_held()  # returns when it has been told
    assert not resident.daemon.outcomes[request]
    pipe.write_bytes(capture_frame())
    assert resident.daemon.outcome(request).error is None
    assert resident.daemon.started.count(request) == 1


@pytest.mark.parametrize(
    ("frame", "kind", "said"),
    [
        *WRONG,
        (lambda: b"\xff" * 100, "InvalidInput", "frame"),
        (lambda: pack(b"{}"), "InvalidGraph", "format"),
        (lambda: pack(b'{"format"', b"\x00" * 20), "InvalidGraph", "JSON"),
    ],
)
def test_what_is_wrong_with_a_request_is_its_own_error(resident, hidden, frame, kind, said):
    """A request that cannot run fails with a report that names the cause, and the next one is right."""
    request = resident.daemon.submit(frame())
    error = resident.daemon.outcome(request).error
    assert kind == error.kind
    assert said in f"{error.what} {error.why}"
    after = resident.daemon.submit(capture_frame())
    assert resident.daemon.outcome(after).error is None
    assert torch.equal(hidden, unpack_values(resident.daemon.result(after))["hidden"])


def test_an_unknown_kind_and_missing_bytes_are_errors(resident):
    """A kind that the worker does not know, and a request file that is gone, fail the request and nothing else."""
    unknown, gone = resident.daemon.submit(capture_frame(), kind="train"), resident.daemon.submit(None)
    assert resident.daemon.outcome(unknown).error.kind == "InvalidInput"
    assert resident.daemon.outcome(gone).error.kind == "NotFound"


def test_a_result_that_cannot_be_written_is_an_error(resident, tmp_path):
    """When there is no folder for the result, the request says so and names the file."""
    request = resident.daemon.submit(operation_frame("torch.zeros", 100_000), result=tmp_path / "missing" / "result")
    error = resident.daemon.outcome(request).error
    assert "could not be written" in error.what
    assert str(tmp_path / "missing" / "result") == error.where


def test_a_dump_reports_how_far_it_is(resident):
    """While a dump runs its progress arrives again and again."""
    daemon, documents = resident.daemon, ["one two three"] * MINUTES
    dump = dump_frame(documents, ("model.layers.0.output",), name="progress", batch_tokens=6)
    request = daemon.submit(dump, kind="dump")
    wait_for(lambda: len({one.tokens for one in daemon.progress[request]}) > 2, "two steps forward")
    daemon.orders = Orders(cancel=(request,))
    assert daemon.outcome(request).cancelled
    daemon.orders = Orders()
    assert {one.tokens_total for one in daemon.progress[request]} == {3 * MINUTES}


def test_the_result_of_a_dump_is_a_summary(resident):
    """What was written, and where it lies."""
    documents = ["the capital of the city is paris " * 20] * 40
    request = resident.daemon.submit(dump_frame(documents, ("model.layers.*.output",), name="summary"), kind="dump")
    assert resident.daemon.outcome(request).error is None
    summary = unpack_values(resident.daemon.result(request))
    assert summary["tokens"] == 40 * 140
    assert summary["padding"] == 0
    assert (resident.places.datasets / "summary.zarr" / "manifest.jsonl").exists()


def test_nobody_waits_for_the_next_report_to_be_cancelled(resident):
    """An order to cancel comes as the answer to a question that is held for it, and stops a request at a module."""
    daemon = resident.daemon
    daemon.reports_answer = False
    request = daemon.submit(endless_frame())
    wait_for(lambda: daemon.lines(request), "the first line")
    daemon.orders = Orders(cancel=(request,))
    outcome = daemon.outcome(request)
    daemon.orders, daemon.reports_answer = Orders(), True
    assert (outcome.cancelled, outcome.error) == (True, None)


def test_a_small_result_comes_with_its_outcome(resident):
    """No file is written for it, and none is removed where nobody wants it: another worker's may be there."""
    daemon, request = resident.daemon, "r-abcdefgh2345"
    others = resident.places.requests / f"{request}.1.result"
    others.write_bytes(b"of another worker")
    daemon.outcome_error = NotFound("no such request")
    daemon.submit(capture_frame(), request=request)
    assert "hidden" in unpack_values(daemon.outcome(request).result)
    daemon.outcome_error = None
    assert daemon.outcome(daemon.submit(capture_frame())).error is None
    assert others.read_bytes() == b"of another worker"
    assert request not in daemon.confirmed


def test_a_large_result_is_written_once_the_lease_is_confirmed(resident):
    """What the daemon does not know as given to this worker is neither written nor told, and the worker goes on."""
    daemon = resident.daemon
    daemon.confirm_error = Conflict("another worker's")
    refused = daemon.submit(operation_frame("torch.zeros", 100_000))
    wait_for(lambda: refused in daemon.confirmed, "the question")
    daemon.confirm_error = None
    written = daemon.submit(operation_frame("torch.zeros", 100_000))
    outcome = daemon.outcome(written)
    assert (outcome.error, outcome.result) == (None, b"")
    assert outcome.result_bytes == len(daemon.result(written)) > 400_000
    assert daemon.confirmed[-1] == written
    assert refused not in daemon.outcomes
    assert not (resident.places.requests / f"{refused}.1.result").exists()


def test_a_result_that_nobody_wants_is_discarded(resident):
    """When the daemon answers Conflict, the result file is removed and the worker goes on."""
    resident.daemon.outcome_error = Conflict("another attempt")
    request = resident.daemon.submit(operation_frame("torch.zeros", 100_000))
    resident.daemon.outcome(request)
    wait_for(lambda: not (resident.places.requests / f"{request}.1.result").exists(), "the removal")
    resident.daemon.outcome_error = None
    after = resident.daemon.submit(capture_frame())
    assert resident.daemon.outcome(after).error is None


def test_an_idle_worker_uses_next_to_no_cpu(resident):
    """At rest it uses under 2 % of a core."""
    process = psutil.Process(resident.processes[0].pid)
    resident.daemon.wait_state("READY")
    assert shares_at_rest([process], 0.02)[0] < 0.02
