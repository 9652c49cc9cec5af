"""A model over three ranks on two compute nodes, on the whole real path: laptop, SSH, bridge, daemon, sbatch, srun, MPI."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from nnsight_hpc import LanguageModel
from nnsight_hpc.storage import ActivationDataset
from tests.end_to_end import experiment
from tests.end_to_end.owner import until
from tests.rest import shares_at_rest

pytestmark = pytest.mark.slow

CLOSE = 1e-4
"""Of the largest value of a tensor: sums over ranks are in another order than in one process (float32)."""
LONG = f"""
import sys, torch
from nnsight_hpc import LanguageModel
with LanguageModel(sys.argv[1]).generate({experiment.PROMPT!r}, max_new_tokens=30, remote=True, pool=sys.argv[3]) as tracer:
    tokens = tracer.result.save()
torch.save(tokens, sys.argv[2])
"""
"""A request that takes longer than to find out that it runs."""
UP = ("--nodes", "2", "--tp", "3", "--time", "00:30:00", "--mem", "3G")
YIELD = ("--setup", "export OMPI_MCA_mpi_yield_when_idle=1")
"""Three ranks on the two cores of a test machine: one that waits gives its core to one that computes."""


@pytest.fixture(scope="module")
def pool(laptop, smollm2):
    """A pool of one Slurm job of three ranks with SmolLM2: two on one node, one on the other."""
    laptop.nnsight("up", "smol", "--model", str(smollm2), *UP, *YIELD, "--wait", timeout=280)
    return "smol"


def replica_of(laptop, pool):
    """The newest replica of a pool, successors left out."""
    status = json.loads(laptop.nnsight("status", "--json").stdout)
    [found] = [one for one in status["pools"] if one["spec"]["name"] == pool]
    replicas = [one for one in found["replicas"] if not one["succeeds"]]
    return max(replicas, key=lambda replica: replica["submitted"])


def serves_anew(laptop, pool, before):
    """Whether another replica than the one before is ready."""
    now = replica_of(laptop, pool)
    return now["id"] != before["id"] and now["state"] in {"READY", "BUSY"}


def ranks_of(replica):
    """The processes of a replica's ranks on all nodes, by rank."""
    found = {}
    for process in psutil.process_iter():
        try:
            if replica["id"] in process.cmdline() and "mpi4py" in process.cmdline() and "srun" not in process.name():
                found[int(process.environ()["SLURM_PROCID"])] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
            continue
    return found


def end_record(replica):
    return json.loads((Path(replica["log"]).parent / "end.json").read_text())


def test_ranks_are_one_job_of_alice_on_two_nodes(laptop, pool, cluster):
    """Three tasks on both nodes, all in one job that squeue shows."""
    replica = replica_of(laptop, pool)
    shown = cluster.run("login", ["squeue", "-h", "-j", replica["job_id"], "-o", "%u %D %C %T"]).stdout.split()
    assert shown[:2] == ["alice", "2"]
    assert shown[3] == "RUNNING"
    assert sorted(ranks_of(replica)) == [0, 1, 2]
    nodes = cluster.home("alice") / ".local/state/nnsight-hpc/slurm/replicas" / replica["id"] / "ranks.json"
    assert json.loads(nodes.read_text()) == ["n1", "n1", "n2"]


def test_an_experiment_is_that_of_one_process(laptop, pool, smollm2):
    """A trace that sets neurons, a gradient and a generation on three ranks equal those of one process, within rounding."""
    file = laptop.home / "ranks.pt"
    laptop.run(sys.executable, experiment.__file__, str(smollm2), str(file), pool)
    here = experiment.experiment(str(smollm2))
    there = torch.load(file)
    for name, expected in here.items():
        assert there[name].shape == expected.shape, name
        distance, scale = (there[name] - expected).abs().max(), expected.abs().max()
        assert distance <= CLOSE * scale, f"{name}: {distance} at a scale of {scale}"
    assert torch.equal(there["tokens"], here["tokens"])


def test_a_dump_is_that_of_one_process(laptop, pool, smollm2):
    """Rows of a dump that three ranks make are those of plain hooks in one process, within rounding."""
    corpus = laptop.home / "ranks.jsonl"
    texts = ["The quick brown fox.", "Paris is the capital of France.", "To be or not to be, that is the question."]
    corpus.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts * 4)))
    laptop.nnsight("dump", pool, str(corpus), "--name", "ranks", "--capture", "model.layers.9.mlp.output")
    path = json.loads(laptop.nnsight("fetch", "ranks", "--to", str(laptop.home), "--json").stdout)["path"]
    laptop.nnsight("rm", "ranks", "--yes")
    dataset, lm = ActivationDataset(path), LanguageModel(str(smollm2))
    document = dataset.document(5)
    with lm.trace(torch.tensor([document.input_ids.tolist()])):
        expected = lm.model.layers[9].mlp.output[0].save()
    rows = torch.tensor(document["model.layers.9.mlp.output"])
    assert (rows - expected).abs().max() <= CLOSE * expected.abs().max()
    assert dataset.documents == 12


def test_idle_ranks_use_next_to_no_cpu(laptop, pool):
    """At rest no rank uses 2 % of a core."""
    ranks = ranks_of(replica_of(laptop, pool))
    assert sorted(ranks) == [0, 1, 2]
    assert max(shares_at_rest(list(ranks.values()), 0.02)) < 0.02


@pytest.mark.long  # test_cluster_failures has a killed rank of a small model
@pytest.mark.timeout(600)
def test_a_killed_rank_is_named_and_its_request_runs_on_another_replica(laptop, pool, smollm2, cluster):
    """A rank on the other node dies in a request: the job ends in seconds, says which rank it was, and nothing is lost."""
    replica, file = replica_of(laptop, pool), laptop.home / "long.pt"
    command = [sys.executable, "-c", LONG, str(smollm2), str(file), pool]
    asking = cluster.popen("laptop", command, env={"HOME": str(laptop.home)}, cwd=laptop.home)
    while replica_of(laptop, pool)["state"] != "BUSY":
        time.sleep(0.5)
    ranks, begun = ranks_of(replica), time.monotonic()
    ranks[2].send_signal(signal.SIGKILL)
    psutil.wait_procs(ranks.values(), timeout=120)
    assert time.monotonic() - begun < 20
    while not serves_anew(laptop, pool, replica):
        assert time.monotonic() - begun < 240
        time.sleep(1)
    record = end_record(replica)
    assert record["cause"] == "CRASHED"
    assert record["detail"].startswith("rank 2 on n2 was killed")
    assert asking.wait(240) == 0
    lm = LanguageModel(str(smollm2))
    with lm.generate(experiment.PROMPT, max_new_tokens=20) as tracer:
        tokens = tracer.result.save()
    assert torch.equal(torch.load(file)[:, : tokens.shape[1]], tokens)


def test_a_launcher_that_does_not_fit_is_told_at_once(laptop, pool, tiny_llama, cluster):
    """With a wrong --mpi the message says that what srun offers is to be looked at; no time has to pass before."""
    model = cluster.shared / "tiny"
    shutil.copytree(tiny_llama, model)
    options = ("--nodes", "2", "--tp", "2", "--mem", "1G", "--mpi", "none", "--wait")
    ended = laptop.nnsight("up", "wrong", "--model", str(model), *options, check=False)
    laptop.nnsight("down", "wrong")
    assert ended.returncode == 9
    assert "the ranks did not come together" in ended.stderr
    assert "srun --mpi=list" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_down_ends_all_ranks(laptop, pool):
    """The ranks end in order, and none is left."""
    replica = replica_of(laptop, pool)
    laptop.nnsight("down", pool, "--wait")
    assert end_record(replica)["cause"] == "DRAINED"
    until(lambda: ranks_of(replica) == {}, "the end of all ranks", 120)
