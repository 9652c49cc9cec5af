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
from nnsight_hpc.wire.errors import Conflict, CorruptData, Denied, HpcError, InvalidGraph, InvalidInput, NotFound
from nnsight_hpc.wire.messages import DumpSpec
from nnsight_hpc.wire.pools import Policy, PoolSpec, PoolStatus
from nnsight_hpc.wire.states import RequestState
from tests.client.program import answer, call
from tests.client.remote import serving
from tests.daemon.process import wait_for

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


def test_the_same_key_is_the_same_dump(pool, lm):
    """Sent again under its idempotency key it is the request that is there; other content under that key is refused."""

    def dump(texts, factor):
        with lm.dump(texts, name="once", remote=True, idempotency_key="once", priority=5, needs="1s") as d:
            d.write("hidden", lm.model.layers[0].output * factor)
        return d.request.id

    assert dump(TEXTS, 2) == dump(TEXTS, 2)
    for texts, factor in ((TEXTS, 3), (TEXTS[:2], 2)):
        with pytest.raises(Conflict, match="other content"):
            dump(texts, factor)


def test_a_damaged_dataset_is_found_out_and_mended(pool, lm):
    """`dump verify` names file, rows and documents, and fails; `dump repair` has just that written again, to the same bytes."""
    with lm.dump(TEXTS, name="mend", remote=True) as d:
        block(lm, d)
    assert "all checksums are right" in call("dump", "verify", "mend")[0]
    assert "nothing is to be done" in call("dump", "repair", "mend")[0]
    shard = d.path / "activations" / "hidden" / "c.0.0"
    before, others = shard.read_bytes(), {f: f.read_bytes() for f in d.path.rglob("c.*") if f != shard}
    shard.write_bytes(bytes([before[0] ^ 1]) + before[1:])
    said = call("dump", "verify", "mend", code=CorruptData.exit_code)[1]
    assert "activations/hidden/c.0.0: crc32c" in said
    assert "documents 0 to 4" in said
    assert "dump repair mend" in said
    assert "whole again" in call("dump", "repair", "mend")[0]
    assert shard.read_bytes() == before
    assert {f: f.read_bytes() for f in others} == others
    assert answer("dump", "verify", "mend")["damage"] == []


def test_a_dump_is_paused_and_cancelled_by_its_name(pool, lm):
    """The lists say how far it is; paused it waits, other requests run; it goes on, and is cancelled."""
    with lm.dump(["one two three"] * 20_000, name="slow", remote=True, blocking=False, batch_tokens=6) as d:
        d.write("hidden", lm.model.layers[0].output)
    wait_for(lambda: d.status().progress)
    assert call("dump", "pause", "slow")[0].startswith("Dump slow: paused")
    wait_for(lambda: d.status().state is RequestState.QUEUED)
    assert "dump resume slow" in call("dump", "status", "slow")[0]
    with lm.trace("one two", remote=True, pool=pool):
        hidden = lm.model.layers[0].output.save()
    assert hidden.shape[1] == 2
    assert not d.request.resume().request.paused
    wait_for(lambda: d.status().state is RequestState.RUNNING)
    rows = {one["name"]: one for one in answer("dumps")}
    assert (rows["slow"]["slices"], rows["slow"]["complete"]) == (1, False)
    [shown] = [line for line in call("dumps")[0].splitlines() if line.startswith("slow")]
    assert "%" in shown
    call("dump", "cancel", "slow")
    assert d.wait(120).state is RequestState.CANCELLED
    call("dump", "pause", "slow", code=Conflict.exit_code)


def test_a_pool_may_be_named_as_a_verb(pool, folder):
    """`dump run POOL CORPUS` says that it is a pool; without it, the verb is meant."""
    (folder / "c.txt").write_text("one two\n")
    arguments = ["status", "c.txt", "--name", "x", "--capture", "model.layers.0.output"]
    assert "no pool status" in call("dump", "run", *arguments, code=NotFound.exit_code)[1]
    assert "No such option" in call("dump", *arguments, code=2)[1]
