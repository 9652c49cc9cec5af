"""A pool's model without weights, as the laptop gets and keeps it."""

from __future__ import annotations

import pytest

from nnsight_hpc.client.skeleton import pool_skeleton
from nnsight_hpc.wire.errors import CorruptData, InvalidInput, NotFound
from nnsight_hpc.wire.messages import ModelIdentity
from nnsight_hpc.wire.pools import PoolSpec, PoolStatus

IDENTITY = ModelIdentity(id="org/model", fingerprint="f" * 32)


@pytest.fixture
def pool(server, base, monkeypatch):
    """A pool on the profile `local`, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))
    server.pools["smol"] = PoolStatus(spec=PoolSpec(name="smol", model="org/model"), desired=1)
    server.model, server.model_files = IDENTITY, {"config.json": b"{}", "tokenizer.json": b"[]"}
    return server


def test_files_are_fetched_once(pool):
    """The folder has them; a second call asks for nothing but their checksums."""
    folder, identity = pool_skeleton("smol")
    assert identity == IDENTITY
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"config.json": b"{}", "tokenizer.json": b"[]"}
    assert [name for name, _ in pool.served] == ["config.json", "tokenizer.json"]
    assert pool_skeleton("smol", "local") == (folder, IDENTITY)
    assert len(pool.served) == 2


def test_a_changed_model_is_fetched_anew(pool):
    """Another tokenizer for the same weights is another folder; the earlier one stays for who uses it."""
    before, _ = pool_skeleton("smol")
    pool.model_files["tokenizer.json"] = b"[1]"
    after, _ = pool_skeleton("smol")
    assert tuple((folder / "tokenizer.json").read_bytes() for folder in (before, after)) == (b"[]", b"[1]")


def test_a_damaged_file_is_not_kept(pool):
    """What does not match its checksum is an error, and nothing of it stays."""
    pool.replace["tokenizer.json"] = b"damaged"
    with pytest.raises(CorruptData, match=r"tokenizer\.json"):
        pool_skeleton("smol")
    pool.replace.clear()
    folder, _ = pool_skeleton("smol")
    assert (folder / "tokenizer.json").read_bytes() == b"[]"
    assert [folder] == list(folder.parent.iterdir())


def test_names_from_the_cluster_lead_nowhere(pool):
    """A file that a daemon should not offer is not written, whatever its name."""
    pool.model_files |= {"../evil": b"x", "modeling.py": b"x"}
    folder, _ = pool_skeleton("smol")
    assert {"config.json", "tokenizer.json"} == {path.name for path in folder.parent.rglob("*") if path.is_file()}


def test_no_such_pool(pool):
    """A pool that is not there is the daemon's error; a name that is none is ours."""
    with pytest.raises(NotFound, match="no pool"):
        pool_skeleton("other")
    with pytest.raises(InvalidInput, match="cannot be the name"):
        pool_skeleton("../x")
