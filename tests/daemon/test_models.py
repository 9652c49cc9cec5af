"""The small files of a pool's model, handed out by the daemon."""

from __future__ import annotations

import hashlib
import json

import pytest

from nnsight_hpc.wire import skeleton
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound
from nnsight_hpc.wire.messages import ModelIdentity, PoolModel
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.pools import PoolSpec, PoolStatus
from nnsight_hpc.wire.states import ReplicaState
from tests.daemon.process import Worker, wait_for

CONFIG, TOKENIZER = b'{"model_type": "llama"}', json.dumps({"version": "1.0"}).encode()


@pytest.fixture
def model(tmp_path):
    """A model's folder, with more in it than may be handed out."""
    folder = tmp_path / "model"
    folder.mkdir()
    files = {
        "config.json": CONFIG,
        "tokenizer.json": TOKENIZER,
        "model.safetensors": b"weights",
        "modeling.py": b"code",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def put(daemon):
    """Put a pool of a name of its own for this model."""

    def put(model: str) -> str:
        name = f"pool{new_request_id()[2:]}"
        daemon.people().put(f"/v1/pools/{name}", PoolSpec(name=name, model=model), PoolStatus)
        wait_for(lambda: daemon.newest(name).state == ReplicaState.STARTING)
        return name

    return put


def fetch(daemon, pool: str, name: str) -> bytes:
    return daemon.people().call("GET", f"/v1/pools/{pool}/model/{name}")


def test_a_folder_is_read_before_any_worker_serves(daemon, put, model):
    """Config and tokenizer of a folder that the daemon can read come at once; weights and code never."""
    pool = put(str(model))
    found = daemon.people().get(f"/v1/pools/{pool}/model", PoolModel)
    assert {file.name: fetch(daemon, pool, file.name) for file in found.files} == {
        "config.json": CONFIG,
        "tokenizer.json": TOKENIZER,
    }
    assert [hashlib.sha256(CONFIG).hexdigest(), len(CONFIG)] == [found.files[0].sha256, found.files[0].size]
    assert ModelIdentity(id=str(model)) == found.model


@pytest.mark.parametrize("name", ["model.safetensors", "modeling.py", "..%2Fsecret", "%2Fetc%2Fpasswd", "vocab.json"])
def test_nothing_else_is_handed_out(daemon, put, model, name):
    """Not the weights, not code, nothing outside of the folder; what is not there is not found."""
    pool = put(str(model))
    (model.parent / "secret").write_text("secret")
    with pytest.raises(NotFound):
        fetch(daemon, pool, name)


def test_a_model_by_name_comes_from_its_worker(daemon, put):
    """Until a worker has found it, the answer says what the pool waits for; then its copy and fingerprint are there."""
    pool = put("org/model")
    with pytest.raises(Conflict, match="not known yet") as raised:
        daemon.people().get(f"/v1/pools/{pool}/model", PoolModel)
    assert "worker" in raised.value.why
    worker = daemon.worker(pool)
    copy = daemon.places.model_copy(worker.replica)
    copy.mkdir()
    (copy / "config.json").write_bytes(CONFIG)
    identity = ModelIdentity(id="org/model", fingerprint="f" * 32)
    worker.report(ReplicaState.READY, model=identity)
    found = daemon.people().get(f"/v1/pools/{pool}/model", PoolModel)
    assert (identity, ["config.json"]) == (found.model, [file.name for file in found.files])
    assert fetch(daemon, pool, "config.json") == CONFIG


def test_a_changed_pool_does_not_hand_out_its_old_model(daemon, put, model):
    """The copy of a worker that held another model is not the pool's any more."""
    pool = put("org/model")
    copy = daemon.places.model_copy(daemon.worker(pool).replica)
    copy.mkdir()
    (copy / "config.json").write_bytes(b"old")
    daemon.people().put(f"/v1/pools/{pool}", PoolSpec(name=pool, model=str(model)), PoolStatus)
    assert fetch(daemon, pool, "config.json") == CONFIG


def test_the_model_is_known_while_it_loads(daemon, put):
    """A worker names the model before its weights are loaded, and requests for it find the pool from then on."""
    pool = put("org/model")
    replica = daemon.people().get(f"/v1/pools/{pool}", PoolStatus).replicas[-1]
    worker = Worker(daemon, replica.id)
    worker.register()
    identity = ModelIdentity(id="org/model", fingerprint="a" * 32)
    worker.report(ReplicaState.LOADING, model=identity)
    assert identity == daemon.people().get(f"/v1/pools/{pool}", PoolStatus).model


def test_a_file_that_is_too_large_is_named(tmp_path, monkeypatch):
    """Nobody's laptop is filled by what calls itself a config."""
    monkeypatch.setattr(skeleton, "MOST", 10)
    (tmp_path / "config.json").write_bytes(b"x" * 11)
    with pytest.raises(InvalidInput, match=r"config\.json is too large"):
        skeleton.describe(tmp_path)
    assert skeleton.describe(tmp_path / "nowhere") == ()
