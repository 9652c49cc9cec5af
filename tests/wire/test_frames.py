import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.frames import joined, pack, parted, unpack


@given(st.binary(), st.binary())
def test_frame_gives_back_what_went_in(header, block):
    """Header and block survive packing for any bytes."""
    got_header, got_block = unpack(pack(header, block))
    assert (got_header, bytes(got_block)) == (header, block)


@given(st.lists(st.binary()))
def test_several_frames_in_one_come_apart_again(frames):
    """Each as it was, in their order, also empty ones and none."""
    assert [*map(bytes, parted(joined(frames)))] == frames


@given(st.binary(max_size=40))
def test_any_bytes_are_a_frame_or_refused(data):
    """Reading arbitrary bytes never fails in another way than InvalidInput."""
    try:
        header, block = unpack(data)
    except InvalidInput:
        return
    assert len(header) + len(block) + 8 == len(data)


def test_header_longer_than_the_frame_is_refused():
    """A length that points beyond the end is refused with both lengths."""
    with pytest.raises(InvalidInput, match="not a valid frame"):
        unpack((100).to_bytes(8, "little") + b"short")
