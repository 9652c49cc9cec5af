"""Dumps from Python on a pool: sent, watched, found where they lie, equal to those of this process; and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from nnsight_hpc import LanguageModel
from nnsight_hpc.client.dumps import send_dump
from nnsight_hpc.client.session import connect
from nnsight_hpc.execution.values import save_tensors
from nnsight_hpc.storage import ActivationDataset
from nnsight_hpc.wire.errors import Conflict, Denied, HpcError, InvalidGraph, InvalidInput
from nnsight_hpc.wire.messages import DumpSpec
from nnsight_hpc.wire.pools import Policy, PoolSpec, PoolStatus
from nnsight_hpc.wire.states import RequestState
from tests.client.program import answer, call
from tests.client.remote import serving

TEXTS = ["one two three four five", "the city of paris", "a tower in rome", "", "seven"]


@pytest.fixture(scope="module")
def pool(tiny_llama):
    with serving(tiny_llama) as name:
        yield name


@pytest.fixture(scope="module")
def lm(tiny_llama):
    return LanguageModel(str(tiny_llama), dispatch=True)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def block(lm, d):
    """An activation, something computed with a matrix that is sent along, and a row for each document."""
    hidden, mask = lm.model.layers[1].output, d.mask[..., None]
    d.write("hidden", hidden)
    d.write("features", torch.relu(hidden @ torch.eye(32)[:, :4]))
    d.write("mean", (hidden * mask).sum(1) / mask.sum(1).clamp(min=1))


def test_a_pool_writes_what_this_process_writes(pool, lm):
    """With remote=True alone: the same arrays, and no pool named: it is found by the weights."""
    with lm.dump(TEXTS, name="one", remote=True) as d:
        block(lm, d)
    with lm.dump(TEXTS, name="one") as here:
        block(lm, here)
    assert d.status().state is RequestState.COMPLETED
    assert d.summary()["tokens"] == here.summary()["tokens"] == len(d.dataset())
    assert d.path != here.path
    for name in ("hidden", "features", "mean"):
        assert np.array_equal(d.dataset()[name][:], here.dataset()[name][:], equal_nan=True)


def test_a_dump_is_not_waited_for_unless_asked(pool, lm):
    """With blocking=False the request is there at once, and what it wrote when it has ended."""
    with lm.dump(TEXTS, name="later", remote=True, pool=pool, blocking=False) as d:
        d.write("hidden", lm.model.layers[0].output)
    assert d.request.id.startswith("r-")
    assert d.wait(120).state is RequestState.COMPLETED
    assert len(d.dataset()["hidden"]) == len(d.dataset())


def test_the_worker_refuses_at_the_users_line(pool, lm):
    """What has no rows is found out by the worker, before it writes."""
    with (
        pytest.raises(InvalidInput, match="no row for each token") as raised,
        lm.dump(TEXTS, name="bad", remote=True) as d,
    ):
        d.write("sum", lm.lm_head.output.sum())
    assert 'd.write("sum", lm.lm_head.output.sum())' in raised.value.where
    assert not d.path.exists()


def test_more_memory_than_a_request_may_have_is_refused(pool, lm):
    """The batch's memory is estimated before it is run."""
    with pytest.raises(InvalidGraph, match="of memory"), lm.dump(["one two " * 100], name="huge", remote=True) as d:
        d.write("a", lm.model.layers[0].output.repeat(1, 1, 100_000))


def test_a_name_is_free_after_a_refusal_and_taken_after_a_dump(pool, lm):
    """What the worker refused has left nothing behind; what is written is not written over."""

    def dump(rows):
        with lm.dump(TEXTS, name="again", remote=True) as d:
            d.write("hidden", lm.model.layers[0].output[rows])

    with pytest.raises(InvalidInput):
        dump((slice(None), slice(1, None)))
    dump(slice(None))
    with pytest.raises(Conflict, match="dataset again exists"):
        dump(slice(None))


def test_a_dry_run_writes_nothing_and_says_what_would_be_written(pool, lm):
    """On the pool as here: the sizes are those of the dataset, and its name stays free."""
    plans = []
    for remote in (True, False):
        with lm.dump(TEXTS, name="planned", remote=remote, dry_run=True) as d:
            block(lm, d)
        plans.append(d.plan())
    assert not d.path.exists()
    there, here = plans
    assert there.seconds > 0
    assert (there.tokens, there.bytes, there.files, there.captures) == (
        here.tokens,
        here.bytes,
        here.files,
        here.captures,
    )
    with lm.dump(TEXTS, name="planned", remote=True) as d:
        block(lm, d)
    assert there.tokens == d.summary()["tokens"]
    assert sum(one.bytes for one in there.captures) == d.summary()["bytes"]


def test_a_policy_holds_for_what_a_dump_reads(pool, lm, tiny_llama):
    """The daemon refuses a graph that reads what the owner has not allowed, at the user's line, before it is queued."""
    daemon = connect("local")
    spec = PoolSpec(name="shut", model=str(tiny_llama), replicas="0:1", policy=Policy(read=("model.layers.1",)))
    daemon.put("/v1/pools/shut", spec, PoolStatus)
    with (
        pytest.raises(Denied, match="policy of pool shut") as raised,
        lm.dump(TEXTS, name="p", remote=True, pool="shut") as d,
    ):
        d.write("hidden", lm.model.layers[0].output)
    assert "layers[0].output" in raised.value.where
    daemon.close()


def recorded(lm):
    with lm.dump(["one"], name="recorded") as d:
        d.write("hidden", lm.model.layers[0].output * torch.ones(32))
    return d.graph


def test_what_the_daemon_cannot_take_is_refused_before_it_is_queued(pool, lm, folder):
    """A graph without its tensors, one that is none, captures beside a graph, sizes that do not fit, no document."""
    graph, lines = recorded(lm), b'{"id":"a","tokens":[3,4]}\n'
    tensors = save_tensors({name: t for name, t in graph.tensors.items() if name.startswith("t")})
    whole = DumpSpec(name="x", graph=graph.to_json(), tensor_bytes=len(tensors))
    nothing = json.loads(graph.to_json()) | {"saves": {}}
    daemon = connect("local")
    for fields, block, said in (
        ({"tensor_bytes": 0}, lines, "tensors that were not sent"),
        ({"graph": json.dumps(nothing)}, tensors + lines, "it keeps nothing"),
        ({"graph": "{}"}, tensors + lines, "not an intervention graph"),
        ({"captures": ("lm_head.output",)}, tensors + lines, "either captures or a graph"),
        ({"tensor_bytes": 10**6}, tensors + lines, "cannot have 1000000 bytes"),
        ({}, tensors, "no document"),
        ({}, tensors + b'{"id":"a","tokens":[-1]}\n', "line 1 of the corpus"),
        ({}, tensors + b'{"id":"a"}\n', "line 1 of the corpus"),
    ):
        spec = DumpSpec(**{name: getattr(whole, name) for name in whole.__struct_fields__} | fields)
        with pytest.raises(HpcError) as raised:
            send_dump(daemon, spec, block, pool)
        assert said in f"{raised.value.what} {raised.value.why}"
    daemon.close()


def test_the_shell_plans_and_writes(pool, lm, folder):
    """`dump --dry-run` shows what would be written, with its sizes; without it, the same is written in windows."""
    (folder / "c.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS if text))
    arguments = [
        "dump",
        pool,
        "c.jsonl",
        "--text-field",
        "body",
        "--name",
        "shell",
        "--capture",
        "model.layers.*.output",
    ]
    options = ["--context", "3", "--stride", "2", "--format", "hdf5"]
    plan, said = answer(*arguments, *options, "--dry-run"), call(*arguments, *options, "--dry-run")[0]
    assert (plan["documents"], plan["tokens"], len(plan["captures"])) == (4, 14, 3)
    assert "4 documents, 14 tokens" in said
    assert "model.layers.2.output" in said
    written = answer(*arguments, *options)
    dataset = ActivationDataset(written["path"])
    assert written["path"].endswith("shell.hdf5")
    assert dataset.tokens.position[:5].tolist() == [0, 1, 2, 1, 2]
