"""Pool definitions: what is read from a file, what options change, and which cluster they lead to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.client import config
from nnsight_hpc.client.config import Cluster
from nnsight_hpc.client.definitions import definition, memory_bytes
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import ReplicaState
from tests.client.program import answer, call, replica

DEFINED = """
[pool.smol]
model = "/models/m"
replicas = "0:2"
idle = "2h"
request_memory = "2G"
setup = ["module load x"]

[pool.smol.policy]
parameters = false
"""
SENT = {
    "name": "smol",
    "model": "/models/m",
    "replicas": "0:2",
    "idle": "2h",
    "request_memory": 2 << 30,
    "setup": ["module load x"],
    "policy": {"parameters": False},
}


def written(text: str, path=None):
    path = path or config.config_file()
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("command", ["up", "plan"])
def test_a_definition_is_all_that_up_and_plan_need(server, command):
    """Its keys are sent, and no other."""
    written(DEFINED)
    call(command, "smol")
    assert server.given["smol"] == SENT


def test_options_count_more_than_the_definition(server):
    """Key by key."""
    written(DEFINED)
    call("up", "smol", "--replicas", "3", "--setup", "other", "--nodes", "2")
    assert server.given["smol"] == {**SENT, "replicas": 3, "setup": ["other"], "nodes": 2}


def test_a_file_takes_the_place_of_the_configuration(server, tmp_path):
    """And a folder that it names lies beside it."""
    written(DEFINED)
    (tmp_path / "model").mkdir()
    file = written('[pool.smol]\nmodel = "model"\n', tmp_path / "pools.toml")
    call("up", "smol", "--file", str(file))
    assert server.given["smol"] == {"name": "smol", "model": str(tmp_path / "model")}
    errors = call("up", "smal", "--file", str(file), code=4)[1]
    assert "there is no [pool.smal]" in errors
    assert "did you mean 'smol'?" in errors


def test_without_a_model_the_defined_pools_are_named(server):
    """A typing error gets the name that was meant."""
    written(DEFINED)
    errors = call("up", "smoll", code=2)[1]
    assert "defined there: smol" in errors
    assert "did you mean 'smol'?" in errors


def test_a_definition_leads_to_its_cluster(server, slurm_server, sshd, environment):
    """For every command about the pool, unless another cluster is named."""
    config.add("uni", sshd.profile("paramiko", environment=environment))
    path = config.config_file()
    path.write_text(f'{path.read_text()}\n[pool.smol]\ncluster = "uni"\nmodel = "m"\n')
    slurm_server.replicas = [replica(ReplicaState.PENDING)]
    assert "nnsight-hpc -c uni explain smol" in call("up", "smol")[1]
    assert slurm_server.given["smol"] == {"name": "smol", "model": "m"}
    assert call("logs", "smol")[0] == "the replica's log\n"
    call("-c", "local", "up", "smol")
    assert server.given["smol"] == {"name": "smol", "model": "m"}
    call("down", "smol")
    assert ([*slurm_server.pools], [*server.pools]) == ([], ["smol"])


def test_profiles_keep_the_definitions_beside_them(base):
    """A cluster is added and removed without touching them."""
    written(DEFINED)
    config.add("uni", Cluster(host="alice@login"))
    config.remove("uni")
    assert set(config.load().pool) == {"smol"}
    assert answer("cluster", "list")["pool"]["smol"]["model"] == "/models/m"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[pool.smol]\nmodle = 'm'", ["no key 'modle'", "did you mean 'model'?", "[pool.smol]"]),
        ("[pool.smol]\ngpus-per-node = 1", ["did you mean 'gpus_per_node'?"]),
        ("[pool.smol]\nquite-another = 1", ["allowed here: cluster, model"]),
        ("[pool.smol]\nnodes = 'two'", ["Expected `int`, got `str` - at `$.nodes`"]),
        ("[pool.smol]\nreplicas = '3:1'", ["replicas cannot be '3:1'", "[pool.smol]"]),
        ("[pool.smol]\nidle = '2 hours'", ["idle cannot be '2 hours'"]),
        ("[pool.smol]\nrequest_memory = '8GB'", ["'8GB' is not a size"]),
        ("[pool.smol]\nsuccession = 'never'", ["$.succession"]),
        ("[pool.smol]\ncluster = 3", ["cluster is not a name"]),
        ("[pool.smol.policy]\nwrite = ['*']", ["write", "$.policy"]),
        ("[pool]\nsmol = 'm'", ["is not a table"]),
        ("[pool.'a/b']\nmodel = 'm'", ["'a/b'"]),
        ("pool = 3", ["pool"]),
    ],
)
def test_a_wrong_definition_is_refused_naming_file_and_key(base, text, words):
    """Whatever command reads the file."""
    path = written(text)
    errors = call("up", "smol", code=2)[1]
    for word in [*words, "" if "a/b" in text else str(path)]:
        assert word in errors


@pytest.mark.parametrize(("given", "expected"), [("500", 500), ("2K", 2048), ("3m", 3 << 20), ("8G", 8 << 30)])
def test_sizes_are_read_as_slurm_writes_them(given, expected):
    """In powers of 1024; without a letter, bytes."""
    assert memory_bytes(given) == expected


@pytest.mark.parametrize("given", ["", "G", "8X", "-1", "1.5G", "8GB", "٣G"])
def test_what_is_no_size_is_refused(given):
    """And the message says what one looks like."""
    with pytest.raises(InvalidInput, match="500M or 8G"):
        memory_bytes(given)


keys = st.sampled_from([*PoolSpec.__struct_fields__, "cluster", "modle"]) | st.text()
values = st.recursive(
    st.integers() | st.floats() | st.booleans() | st.text() | st.dates() | st.times(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


@given(st.dictionaries(keys, values, max_size=4) | values)
def test_whatever_stands_in_a_file_is_read_or_refused_in_words(table):
    """No value that TOML can have leads to anything else, and what is taken is sent as it stands there."""
    found = read(table)
    if isinstance(found, InvalidInput):
        assert found.where == "the file"
    else:
        assert without_sizes(found) == without_sizes(table)


def read(table):
    try:
        return definition("smol", table, where="the file")
    except InvalidInput as error:
        return error


def without_sizes(table):
    return {key: value for key, value in table.items() if key != "request_memory"}
