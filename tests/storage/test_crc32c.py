from itertools import pairwise

import google_crc32c
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.storage.crc32c import PiecewiseChecksum

CONTENT = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)


@given(cuts=st.lists(st.integers(0, len(CONTENT)), max_size=20), order=st.randoms(use_true_random=False))
def test_pieces_in_any_order_have_the_checksum_of_the_whole(cuts, order):
    """Wherever the content is cut, and whichever piece comes first; empty pieces change nothing."""
    pieces = list(pairwise([0, *sorted(cuts), len(CONTENT)]))
    order.shuffle(pieces)
    checksum = PiecewiseChecksum()
    for start, stop in pieces:
        checksum.add(start, CONTENT[start:stop])
    assert checksum.value() == google_crc32c.value(CONTENT)


def test_a_piece_of_more_than_32_bits_can_stand_behind_another():
    """5 GiB of zeros, whose beginning comes last."""
    zeros, checksum, expected = np.zeros(1 << 28, dtype=np.uint8), PiecewiseChecksum(), google_crc32c.value(b"head")
    for number in range(20):
        checksum.add(4 + number * len(zeros), zeros)
        expected = google_crc32c.extend(expected, zeros)
    checksum.add(0, b"head")
    assert checksum.value() == expected
