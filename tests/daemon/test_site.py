"""What a site decides about pools: its file, read strictly, and what becomes of the keys that people give."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.daemon.site import Site, read_site
from nnsight_hpc.wire.errors import InvalidInput, NotFound
from nnsight_hpc.wire.places import SITE_VARIABLE
from nnsight_hpc.wire.pools import PoolSpec

WHOLE = """
required = ["account"]

[defaults]
partition = "gpu"
time = "12:00:00"
setup = ["module load openmpi"]
policy = { parameters = false }

[allowed]
partition = ["gpu", "gpu-long"]
setup = ["module load openmpi", "module load cuda"]

[limits]
nodes = 4
time = "1-00:00:00"
mem = "500G"
replicas = 2
idle = "4h"
"""


@pytest.fixture
def site_of(tmp_path, monkeypatch):
    """Read a site file with this text."""

    def read(text: str) -> Site:
        path = tmp_path / "site.toml"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setenv(SITE_VARIABLE, str(path))
        return read_site()

    return read


def test_defaults_fill_in_what_was_not_given(site_of):
    """A key that was given counts, null is not given, and what neither says is as without a site file."""
    site = site_of(WHOLE)
    keys = {"model": "m", "account": "lab", "time": "01:00:00", "partition": None}
    spec = site.complete("p", keys)
    assert (spec.name, spec.partition, spec.time, spec.setup) == ("p", "gpu", "01:00:00", ("module load openmpi",))
    assert (spec.policy.parameters, spec.nodes, spec.account) == (False, 1, "lab")
    filled = "partition = 'gpu', setup = ['module load openmpi'], policy = {'parameters': False}"
    assert site.filled_in(keys) == f"from {site.path}: {filled}"


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"account": None}, "required: account must be given"),
        ({"partition": "cpu"}, "[allowed] partition: 'cpu' is not one of gpu, gpu-long"),
        ({"setup": ["module load cuda", "curl x"]}, "[allowed] setup: 'curl x' is not one of"),
        ({"nodes": 5, "tp": 5}, "[limits] nodes: 5 is more than 4"),
        ({"time": "1-00:00:01"}, "[limits] time: 1-00:00:01 is more than 1-00:00:00"),
        ({"mem": "501G"}, "[limits] mem: 501G is more than 500G"),
        ({"mem": "0"}, "[limits] mem: 0 is more than 500G"),
        ({"replicas": "0:3"}, "[limits] replicas: 0:3 is more than 2"),
        ({"idle": "5h"}, "[limits] idle: 5h is more than 4h"),
    ],
)
def test_what_the_site_does_not_want_is_refused_with_its_place_in_the_file(site_of, keys, why):
    """The refusal names the file, the table and the key, what was asked for and what may be."""
    site = site_of(WHOLE)
    with pytest.raises(InvalidInput, match="does not fit") as caught:
        site.complete("p", {"model": "m", "account": "lab", **keys})
    assert why in caught.value.why
    assert caught.value.where == site.path


def test_all_that_is_wrong_is_said_at_once(site_of):
    """Two keys that do not fit are two lines."""
    with pytest.raises(InvalidInput) as caught:
        site_of(WHOLE).complete("p", {"model": "m", "account": "lab", "nodes": 9, "partition": "cpu"})
    assert len(caught.value.why.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("defaults = 3", "", "$.defaults"),
        ("colour = 1", "", "colour"),
        ("[defaults\nx = 1", "", "line 1"),
        ('[defaults]\ncolour = "red"', "[defaults] colour", "no key colour"),
        ('[defaults]\nname = "p"', "[defaults] name", "no key name"),
        ('[defaults]\nnodes = "two"', "[defaults] nodes", "Expected `int`, got `str`"),
        ('[defaults]\nidle = "soon"', "[defaults] idle", "write a duration as"),
        ('required = ["acount"]', "required, acount", "no key acount"),
        ("[allowed]\npartition = [1]", "[allowed] partition", "got `int`"),
        ("[limits]\npartition = 'gpu'", "[limits] partition", "what can be limited is nodes"),
        ("[limits]\ntime = 'long'", "[limits] time", "time cannot be 'long'"),
        ("[limits]\nmem = 'much'", "[limits] mem", "mem cannot be 'much'"),
    ],
)
def test_a_site_file_that_is_wrong_is_refused_with_file_and_key(site_of, text, place, why):
    """Unknown keys, wrong types and values that no pool could have are said where they stand, not passed over."""
    with pytest.raises(InvalidInput, match="site file cannot be used") as caught:
        site_of(text)
    assert "site.toml" in caught.value.where
    assert place in caught.value.where
    assert why in caught.value.why


def test_a_file_that_is_named_must_be_there_and_the_usual_one_need_not(monkeypatch, tmp_path):
    """$NNSIGHT_HPC_SITE is somebody's wish; without it and without the usual file nothing is decided."""
    monkeypatch.setenv(SITE_VARIABLE, str(tmp_path / "none.toml"))
    with pytest.raises(InvalidInput, match="no site file") as caught:
        read_site()
    assert str(tmp_path / "none.toml") in caught.value.where
    monkeypatch.delenv(SITE_VARIABLE)
    monkeypatch.setattr("nnsight_hpc.daemon.site.USUAL", tmp_path / "none.toml")
    assert read_site() == Site()
    assert Site().complete("p", {"model": "m"}) == PoolSpec(name="p", model="m")


_VALUES = st.one_of(st.integers(), st.booleans(), st.text(max_size=8), st.lists(st.integers(), max_size=2))


@given(st.dictionaries(st.sampled_from(PoolSpec.__struct_fields__), _VALUES, max_size=4))
def test_whatever_keys_are_given_the_answer_is_a_pool_or_an_error_of_ours(keys):
    """No combination of keys and values gets past the types, or raises anything else."""
    found = _complete(keys)
    if isinstance(found, str):
        assert "$." in found
    else:
        plain = {key: value for key, value in keys.items() if not isinstance(value, list)}
        assert plain == {key: getattr(found, key) for key in plain}


def _complete(keys) -> PoolSpec | str:
    try:
        return Site().complete("p", {"model": "m", **keys})
    except InvalidInput as error:
        return error.why


def test_the_daemon_reads_the_file_as_it_is_when_a_pool_is_put(daemon_with, tmp_path, monkeypatch):
    """A change counts for the next pool, without a restart; a refusal leaves no pool."""
    path = tmp_path / "site.toml"
    path.write_text('[defaults]\nmodel = "org/usual"\ndtype = "float16"')
    monkeypatch.setenv(SITE_VARIABLE, str(path))
    daemon = daemon_with()
    assert daemon.up("first").spec == PoolSpec(name="first", model="org/model", dtype="float16")
    path.write_text("[allowed]\ndtype = ['float32']")
    with pytest.raises(InvalidInput, match="does not fit"):
        daemon.up("second")
    path.write_text("[limit]")
    with pytest.raises(InvalidInput, match="site file cannot be used"):
        daemon.up("second")
    with pytest.raises(NotFound, match="no pool second"):
        daemon.people().call("GET", "/v1/pools/second")
