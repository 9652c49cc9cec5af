"""Profiles: what is read, what is refused, and that writing leaves the rest of the file alone."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnsight_hpc.client import config
from nnsight_hpc.client.config import Cluster, Config
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound

UNI = Cluster(host="alice@login.uni.edu", port=2222, transport="openssh")


def written(base, text: str):
    path = config.config_file()
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_no_file_is_no_cluster_but_local(base):
    """A new user has the profile `local` and nothing else."""
    found = config.load()
    assert found == Config()
    assert found.chosen() == "local"
    assert found.find("local") is None


def test_what_is_added_is_read_again(base):
    """A profile comes back as it was given, and as the default where that was asked for."""
    config.add("uni", UNI, default=True)
    assert config.load() == Config("uni", {"uni": UNI})


def test_the_choice_is_argument_then_variable_then_default_then_local(base, monkeypatch):
    """The nearer word counts."""
    config.add("uni", UNI, default=True)
    profiles = config.load()
    assert profiles.chosen() == "uni"
    monkeypatch.setenv("NNSIGHT_HPC_CLUSTER", "other")
    assert profiles.chosen() == "other"
    assert profiles.chosen("third") == "third"


def test_comments_and_other_tables_survive_a_change(base):
    """`add` and `remove` touch only what they are about."""
    path = written(base, '# mine\n[cluster.a] # first\nhost = "a"\n\n# about b\n[cluster.b]\nhost = "b" # here\n')
    config.add("c", UNI, default=True)
    config.remove("a")
    text = path.read_text()
    assert config.load() == Config("c", {"b": Cluster(host="b"), "c": UNI})
    assert "# mine" in text
    assert "# here" in text


def test_removing_the_default_leaves_none(base):
    """No default points to a profile that has gone."""
    config.add("uni", UNI, default=True)
    config.remove("uni")
    assert config.load() == Config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("defualt = 1", ["'defualt'", "default, cluster"]),
        ('[cluster.uni]\nhost = "x"\nprot = 3', ["'cluster.uni.prot'", "host, transport, port"]),
        ("[cluster.uni]\nport = 3", ["host"]),
        ('[cluster.uni]\nhost = "x"\nport = "22"', ["port"]),
        ('[cluster.uni]\nhost = "x"\ntransport = "telnet"', ["transport", "telnet"]),
        ('[cluster.uni]\nhost = "-oProxyCommand=evil"', ["-oProxyCommand=evil", "not a host"]),
        ('[cluster.local]\nhost = "x"', ["local", "this machine"]),
        ('[cluster."a/b"]\nhost = "x"', ["'a/b'"]),
        ('default = "nope"', ["'nope'"]),
        ("cluster = 3", ["cluster"]),
        ("[cluster", ["not valid TOML"]),
    ],
)
def test_a_wrong_file_is_refused_naming_file_and_key(base, text, words):
    """The message has the file, the key, and what may stand there."""
    path = written(base, text)
    with pytest.raises(InvalidInput) as caught:
        config.load()
    for word in [*words, "" if "a/b" in text else str(path)]:
        assert word in str(caught.value)


def test_an_unknown_cluster_is_answered_with_those_there_are(base):
    """A typing error gets the name that was meant."""
    config.add("uni", UNI)
    with pytest.raises(NotFound, match="did you mean 'uni'"):
        config.load().find("unl")


@pytest.mark.parametrize("name", ["uni", "local"])
def test_a_name_that_exists_is_a_conflict(base, name):
    """Nothing is overwritten."""
    config.add("uni", UNI)
    with pytest.raises(Conflict):
        config.add(name, UNI)


def test_local_cannot_be_removed(base):
    """The profile of one's own machine stays."""
    with pytest.raises(InvalidInput):
        config.remove("local")


def test_a_file_in_a_form_that_is_not_understood_is_left_alone(base):
    """An inline table is valid TOML, but no section that could be taken out."""
    path = written(base, '[cluster]\nuni = { host = "x" }\n')
    with pytest.raises(InvalidInput, match="cannot be changed here"):
        config.remove("uni")
    assert path.read_text() == '[cluster]\nuni = { host = "x" }\n'


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(lambda name: name != "local")
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
hosts = texts.filter(lambda host: not host.startswith("-") and not any(c.isspace() for c in host))
profiles = st.builds(
    Cluster,
    host=hosts,
    port=st.none() | st.integers(1, 65535),
    transport=st.sampled_from(["paramiko", "openssh"]),
    identity_file=st.none() | texts,
    command=texts,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(names, profiles, min_size=1, max_size=4), st.data())
def test_any_profiles_survive_writing_and_reading(base, clusters, data):
    """Whatever names and strings people come up with, TOML gives them back."""
    config.config_file().unlink(missing_ok=True)
    for name, profile in clusters.items():
        config.add(name, profile)
    assert config.load().cluster == clusters
    gone = data.draw(st.sampled_from(sorted(clusters)))
    config.remove(gone)
    assert config.load().cluster == {name: each for name, each in clusters.items() if name != gone}
