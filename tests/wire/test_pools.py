import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import decode, encode
from nnsight_hpc.wire.pools import PoolSpec


def test_unknown_field_of_a_pool_is_named():
    """A misspelt field of what people write is refused by name."""
    with pytest.raises(InvalidInput, match="modle"):
        decode(b'{"name": "a", "modle": "b"}', PoolSpec)


@given(st.builds(PoolSpec, name=st.text(), model=st.text(), nodes=st.integers(0, 2**31), setup=st.tuples(st.text())))
def test_pool_survives_json(spec):
    """A pool is the same after JSON, whatever its strings."""
    assert decode(encode(spec), PoolSpec) == spec


@given(st.binary())
def test_any_bytes_are_a_pool_or_refused(data):
    """Arbitrary bytes are refused as InvalidInput."""
    try:
        decode(data, PoolSpec)
    except InvalidInput:
        return


@pytest.mark.parametrize(("given", "least", "most"), [(1, 1, 1), (3, 3, 3), ("2", 2, 2), ("1:3", 1, 3), ("0:1", 0, 1)])
def test_replicas_are_a_number_or_a_range(given, least, most):
    """One number is both ends of the range; only the least may be 0."""
    spec = PoolSpec(name="a", model="m", replicas=given)
    assert (spec.least, spec.most) == (least, most)


@pytest.mark.parametrize("given", [0, -1, "0", "0:0", "3:1", "1:", ":3", "1:2:3", "a", "", "1:٣", "1 : 3"])
def test_other_replicas_are_refused(given):
    """What is no number of at least 1, and no rising range, is refused with what could be said instead."""
    with pytest.raises(InvalidInput, match=r"replicas cannot be .*\n.*least:most"):
        _ = PoolSpec(name="a", model="m", replicas=given).most


@pytest.mark.parametrize(
    ("given", "seconds"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("2d", 172_800), ("0s", 0), (None, None)]
)
def test_idle_time_is_a_duration(given, seconds):
    """Durations are written with d, h, m and s; without one nothing is released."""
    assert PoolSpec(name="a", model="m", idle=given).idle_seconds == seconds


@pytest.mark.parametrize("given", ["", "5", "5 m", "m", "-5m", "5w", "1.5h", "٣m", "5m\n"])
def test_other_durations_are_refused(given):
    """Anything else is refused, naming the key."""
    with pytest.raises(InvalidInput, match="idle cannot be"):
        _ = PoolSpec(name="a", model="m", idle=given).idle_seconds
