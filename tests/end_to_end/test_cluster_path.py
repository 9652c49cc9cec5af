"""The whole path, on real parts: laptop, SSH with strict host keys, bridge, daemon, sbatch, worker on a compute node."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from nnsight_hpc import LanguageModel
from nnsight_hpc.storage import list_files

pytestmark = pytest.mark.slow

PROMPT = "The Eiffel Tower is in the city of"
EXPERIMENT = """
    import sys, torch
    from nnsight_hpc import LanguageModel

    lm = LanguageModel(sys.argv[1])
    with lm.trace({prompt!r}, remote=True, pool="smol"):
        hidden = lm.model.layers[7].output.save()
        lm.model.layers[20].mlp.down_proj.input[:, -1, [3, 9]] = 10
        logits = lm.lm_head.output[:, -1].save()
    torch.save({{"hidden": hidden, "logits": logits}}, sys.argv[2])
    try:
        with lm.trace({prompt!r}, remote=True):
            lm.model.layers[7].output[:, 99].save()
    except IndexError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def pool(laptop, smollm2):
    """A pool of one Slurm job with SmolLM2."""
    laptop.nnsight("up", "smol", "--model", str(smollm2), "--time", "00:20:00", "--mem", "3G", "--wait", timeout=240)
    return "smol"


def test_answer_is_that_of_this_machine(laptop, pool, smollm2, tmp_path):
    """A trace with an intervention, run on a compute node, equals the local one (1e-4); an error names the user's line."""
    script = laptop.home / "experiment.py"
    script.write_text(textwrap.dedent(EXPERIMENT.format(prompt=PROMPT)))
    said = laptop.run(sys.executable, str(script), str(smollm2), str(laptop.home / "remote.pt")).stdout
    remote = torch.load(laptop.home / "remote.pt")
    lm = LanguageModel(str(smollm2))
    with lm.trace(PROMPT):
        hidden = lm.model.layers[7].output.save()
        lm.model.layers[20].mlp.down_proj.input[:, -1, [3, 9]] = 10
        logits = lm.lm_head.output[:, -1].save()
    torch.testing.assert_close(remote["hidden"], hidden, rtol=0, atol=1e-4)
    torch.testing.assert_close(remote["logits"], logits, rtol=0, atol=1e-3)
    assert "experiment.py" in said.splitlines()[0]
    assert "IndexError: index 99 is out of bounds" in said


def test_worker_is_a_slurm_job_of_alice(laptop, pool, cluster):
    """The pool's worker runs as alice on a compute node, in a job that squeue shows."""
    status = json.loads(laptop.nnsight("status", "--json").stdout)
    [replica] = [one for one in status["pools"][0]["replicas"] if not one["succeeds"]]
    shown = cluster.run("login", ["squeue", "-h", "-j", replica["job_id"], "-o", "%u %N %T"]).stdout.split()
    assert shown == ["alice", replica["host"], "RUNNING"]
    assert replica["host"] in ("n1", "n2")


def test_the_doctor_finds_every_link_whole(laptop, pool):
    """From the laptop's configuration to one token through the model on a compute node; the exit code is 0."""
    checks = json.loads(laptop.nnsight("doctor", "--json").stdout)
    assert [check["link"] for check in checks if check["finding"] != "works"] == []
    assert [check["link"] for check in checks][-2:] == ["pool smol", "forward smol"]


def test_dump_is_fetched_byte_for_byte(laptop, pool, cluster):
    """A dataset dumped on a compute node and fetched over SSH has the same files with the same bytes as scratch."""
    corpus = laptop.home / "corpus.jsonl"
    texts = ["The quick brown fox.", "Paris is the capital of France.", "To be or not to be, that is the question."]
    corpus.write_text("".join(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(texts * 4)))
    points = ("--capture", "model.layers.*.mlp.output", "--dtype", "bfloat16")
    laptop.nnsight("dump", pool, str(corpus), "--name", "run1", *points)
    fetched = json.loads(laptop.nnsight("fetch", "run1", "--to", str(laptop.home), "--json").stdout)["path"]
    [dataset] = json.loads(laptop.nnsight("ls", "--json").stdout)["there"]
    here, there = (
        (laptop.home / "run1.zarr"),
        cluster.home("alice") / ".local/state/nnsight-hpc/slurm/datasets/run1.zarr",
    )
    assert (fetched, dataset["path"]) == (str(here), str(there))
    assert list_files(here) == list_files(there)
    assert dataset["request"]["progress"]["documents"] == 12
    names = sorted(path.relative_to(there) for path in there.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(here) for path in here.rglob("*") if path.is_file())
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in names)


def test_second_dump_of_the_same_name_is_refused(laptop, pool):
    """A dataset name that exists is one clear message and the exit code of a conflict."""
    corpus = laptop.home / "other.jsonl"
    corpus.write_text(json.dumps({"id": "a", "text": "Hello."}) + "\n")
    ended = laptop.nnsight(
        "dump", pool, str(corpus), "--name", "run1", "--capture", "model.layers.0.output", check=False
    )
    assert ended.returncode == 5
    assert "run1" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_removed_dataset_is_gone_from_scratch_only(laptop, pool):
    """`rm` takes the dataset off the cluster, and the fetched copy stays."""
    [dataset] = json.loads(laptop.nnsight("ls", "--json").stdout)["there"]
    laptop.nnsight("rm", "run1", "--yes")
    assert not Path(dataset["path"]).exists()
    assert (laptop.home / "run1.zarr" / "zarr.json").exists()
    assert json.loads(laptop.nnsight("ls", "--json").stdout)["there"] == []


def test_job_that_ends_before_it_registers_shows_its_log(laptop, pool):
    """A model path that does not exist on the compute node: the message shows the worker's last lines."""
    ended = laptop.nnsight("up", "wrong", "--model", "/no/such/model", "--mem", "1G", "--wait", check=False)
    laptop.nnsight("down", "wrong")
    assert ended.returncode == 9
    assert "/no/such/model" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_unknown_pool_lists_those_that_are_there(laptop, pool):
    """A request for a pool that does not exist names the pools."""
    graph = laptop.home / "graph.json"
    graph.write_text(
        '{"format":"nnsight-hpc/graph","version":1,"model":{"id":"m"},"kind":"trace","nodes":[],"saves":{}}'
    )
    ended = laptop.nnsight("run", str(graph), "--pool", "nope", check=False)
    assert ended.returncode == 4
    assert "nope" in ended.stderr
    assert "smol" in ended.stderr


def test_operation_that_is_not_allowed_is_refused_before_it_is_queued(laptop, pool):
    """A graph with a forbidden operation is refused by the daemon, which names it."""
    graph = laptop.home / "evil.json"
    node = '{"id":0,"op":"torch.load","args":["/etc/passwd"]}'
    graph.write_text(
        f'{{"format":"nnsight-hpc/graph","version":1,"model":{{"id":"m"}},"kind":"trace","nodes":[{node}],"saves":{{}}}}'
    )
    ended = laptop.nnsight("run", str(graph), "--pool", pool, check=False)
    assert ended.returncode == 2
    assert "torch.load" in ended.stderr
    assert "reads or writes files" in ended.stderr
