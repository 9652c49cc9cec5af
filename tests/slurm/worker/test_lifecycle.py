"""How workers begin and end: refusals, load failures, signals, draining."""

from __future__ import annotations

import signal
import subprocess

import msgspec
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nnsight_hpc.execution.values import unpack_values
from nnsight_hpc.wire.workers import Orders
from tests.slurm.worker.graphs import capture_frame, endless_frame
from tests.slurm.worker.stand_in import wait_for

SMALL = """
import resource, runpy, psutil, torch, transformers.models.llama.modeling_llama
most = psutil.Process().memory_info().vms + (2 << 30)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
runpy.run_module("nnsight_hpc.slurm.worker", run_name="__main__", alter_sys=True)
"""
"""A worker that may have 2 GiB."""


def test_usr2_ends_an_idle_worker_at_once(bench):
    """SIGUSR2 cuts the long poll: the worker ends with code 0 and says that it drained, in a file and to the daemon."""
    bench.daemon.answers_polls = False
    worker = bench.ready_worker()
    wait_for(lambda: bench.daemon.asked_for_work, "its poll, which nobody answers")
    worker.send_signal(signal.SIGUSR2)
    assert worker.wait(120) == 0
    assert bench.end_record().cause == "DRAINED"
    assert [record.cause for record in bench.daemon.ends] == ["DRAINED"]


def test_usr2_lets_a_running_request_finish(bench):
    """A request that runs when SIGUSR2 comes is finished and delivered; the one behind it is not begun."""
    worker = bench.ready_worker()
    first, pipe = bench.daemon.submit_held()
    second = bench.daemon.submit(capture_frame())
    worker.send_signal(signal.SIGUSR2)
    bench.daemon.wait_state("DRAINING")
    pipe.write_bytes(capture_frame(forwards=10))
    assert worker.wait(120) == 0
    assert "hidden" in unpack_values(bench.daemon.result(first))
    assert bench.daemon.outcome(first).error is None
    assert not bench.daemon.outcomes[second]
    assert bench.end_record().cause == "DRAINED"


def test_term_gives_up_what_runs(bench):
    """SIGTERM ends a running request at a module, without an outcome, so that another worker gets it."""
    worker = bench.ready_worker()
    request = bench.daemon.submit(endless_frame())
    wait_for(lambda: bench.daemon.lines(request), "the first line")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(120) == 0
    assert not bench.daemon.outcomes[request]
    assert bench.end_record().cause == "CANCELLED"


def test_a_worker_without_job_json_asks_the_daemon_and_obeys_it(bench):
    """Submitted by hand, a worker learns its pool from the welcome; the daemon's order to drain does what SIGUSR2 does."""
    worker = bench.worker("by-hand", job=False)
    bench.daemon.wait_state("READY")
    assert [hello.replica for hello in bench.daemon.hellos] == ["by-hand"]
    request, pipe = bench.daemon.submit_held()
    bench.daemon.orders = Orders(drain=True)
    bench.daemon.wait_state("DRAINING")
    pipe.write_bytes(capture_frame())
    assert worker.wait(120) == 0
    assert bench.daemon.outcome(request).error is None
    assert bench.end_record("by-hand").cause == "DRAINED"


@pytest.mark.parametrize(("number", "cause"), [(signal.SIGUSR2, "DRAINED"), (signal.SIGINT, "CANCELLED")])
def test_a_signal_while_it_starts_is_not_lost(bench, number, cause):
    """A worker that is told to end before it has imported torch ends in order, and says so."""
    worker = bench.worker()
    wait_for(lambda: bench.daemon.hellos, "its registration")
    worker.send_signal(number)
    assert worker.wait(120) == 0
    assert cause == bench.end_record().cause


def test_a_model_that_is_not_there_ends_the_worker_with_the_words(bench):
    """A load failure ends with code 1; the words are in the end record, at the daemon, and last in the log."""
    bench.spec = msgspec.structs.replace(bench.spec, model="/no/such/model")
    worker = bench.worker()
    assert worker.wait(120) == 1
    record = bench.end_record()
    assert record.cause == "CRASHED"
    assert "there is no such folder for a model" in record.detail
    assert "/no/such/model" in record.detail
    assert [record] == bench.daemon.ends
    assert bench.log().rstrip().endswith(record.detail)
    assert "Traceback" not in bench.log()


def test_a_model_that_does_not_fit_is_out_of_memory(bench, tmp_path):
    """A worker that cannot have the memory for the weights says so in the cause of its end."""
    bench.spec = msgspec.structs.replace(bench.spec, model=str(_large_model(tmp_path / "large")))
    worker = bench.worker(program=("-c", SMALL), MALLOC_ARENA_MAX="1")
    assert worker.wait(120) == 1
    assert bench.end_record().cause == "OUT_OF_MEMORY", bench.log()


def _large_model(folder):
    """A Llama whose embedding takes 4 GiB, all zeros: the file takes no room on the disk."""
    config = LlamaConfig(vocab_size=1 << 22, hidden_size=256, intermediate_size=64, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 4
    config.tie_word_embeddings = True
    config.save_pretrained(folder)
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    header, end = {}, 0
    for name, parameter in parameters.items():
        offsets = [end, end := end + parameter.nbytes]
        header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": offsets}
    text = msgspec.json.encode(header)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def test_a_secret_that_others_can_read_is_refused(bench):
    """A worker does not use a secret that is not private; it says the mode, and does not even dial."""
    bench.places.secret.chmod(0o644)
    worker = bench.worker()
    assert worker.wait(120) == 1
    assert "0644" in bench.end_record().detail
    assert bench.daemon.hellos == []
    assert bench.daemon.refused == 0


def test_a_wrong_secret_ends_the_worker(bench):
    """A daemon that refuses the secret at registration ends the worker before it loads anything."""
    bench.places.secret.write_text("not-the-secret")
    assert bench.worker().wait(120) == 1
    assert "the secret is wrong" in bench.end_record().detail
    assert bench.daemon.refused > 0


def test_another_certificate_is_not_trusted(bench):
    """A server with another certificate than the lease's gets no call, and so no secret."""
    other = bench.places.certificate.read_text()
    bench.daemon.stop()
    bench.places.certificate.unlink()
    bench.daemon.start()  # makes a new certificate
    record = msgspec.json.decode(bench.places.lease.read_bytes())
    bench.places.lease.write_bytes(msgspec.json.encode(record | {"certificate": other}))
    worker = bench.worker(job=False)
    wait_for(lambda: "certificate verify failed" in bench.log(), "its word on that")
    assert worker.poll() is None
    assert bench.daemon.hellos == []
    assert bench.daemon.refused == 0


def test_a_worker_without_a_daemon_loads_and_waits(bench):
    """With job.json at hand it loads while no daemon listens, registers when one comes, and serves."""
    bench.daemon.stop()
    bench.daemon.unknown.add("w1")
    worker = bench.worker()
    wait_for(lambda: "is ready to serve" in bench.log(), "the loaded model", 120)
    assert worker.poll() is None
    bench.daemon.unknown.clear()
    bench.daemon.start()
    request = bench.daemon.submit(capture_frame())
    assert bench.daemon.outcome(request).error is None


def test_a_worker_that_no_daemon_knows_ends(bench):
    """A replica that the daemon does not know, and does not take up, ends with the daemon's words."""
    bench.daemon.unknown.add("w1")
    assert bench.worker().wait(120) == 1
    assert "no such replica" in bench.end_record().detail


def test_one_of_several_copies_is_refused(bench):
    """A worker that was started without `--ranks` as one of several tasks of a job step dials nobody."""
    assert bench.worker(SLURM_STEP_NUM_TASKS="2").wait(120) == 1
    assert "is to have 2 ranks, and this worker was started as 1" in bench.end_record().detail
    assert bench.daemon.hellos == []


def test_one_process_does_not_stand_for_several_ranks(bench):
    """A process that is alone, where the pool has several ranks, is refused before anything is loaded."""
    bench.spec = msgspec.structs.replace(bench.spec, nodes=2, tp=4)
    assert bench.worker().wait(120) == 1
    assert "is to have 4 ranks" in bench.end_record().detail
    assert "LOADING" not in [report.state for report in bench.daemon.reports]


def test_an_unusable_replica_id_is_refused(bench):
    """A replica id that is not a plain name is a usage error, and no folder is made for it."""
    worker = bench.worker("w1", job=False)
    worker.kill()
    command = [*worker.args[:-1], "../evil"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "cannot be the name of a replica" in done.stderr
    assert not (bench.places.replicas.parent / "evil").exists()
