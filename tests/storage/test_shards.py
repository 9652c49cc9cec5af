import shutil
from itertools import pairwise

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnsight_hpc.storage.layout import ArrayLayout
from nnsight_hpc.storage.shards import ShardWriter, remove_partials
from nnsight_hpc.wire.errors import Conflict, InvalidInput

LAYOUT = ArrayLayout("activations/x", (1300, 3), "bfloat16", 256, 1024)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "activations/x").mkdir(parents=True)
    return tmp_path


def _write(root, shard, blocks):
    with ShardWriter(root, LAYOUT.shard_file(shard)) as writer:
        for row, block in blocks:
            writer.write(row, block)
        entry = writer.seal(slice_number=7, writer="me")
        writer.publish()
    return entry


def _expected(rows, chunks_there, chunks):
    """A shard file as docs/spec/dataset.md describes it, made by hand."""
    size = 256 * 3 * 2
    padding = np.full((chunks_there * 256 - len(rows), 3), 0x7FC0, dtype="<u2")
    index = b"".join((i * size).to_bytes(8, "little") + size.to_bytes(8, "little") for i in range(chunks_there))
    index += b"\xff" * 16 * (chunks - chunks_there)
    return rows.tobytes() + padding.tobytes() + index + google_crc32c.value(index).to_bytes(4, "little")


@pytest.mark.parametrize(("shard", "start", "stop", "chunks"), [(0, 0, 1024, 4), (1, 1024, 1300, 2)])
def test_a_shard_file_has_the_bytes_that_the_specification_says(*, root, random_rows, shard, start, stop, chunks):
    """Rows, padding with the fill value, index, checksum: nothing else, for a full and for a cut shard."""
    rows = random_rows("bfloat16", (stop - start, 3))
    entry = _write(root, shard, [(start, rows)])
    content = (root / LAYOUT.shard_path(shard)).read_bytes()
    assert _expected(rows, chunks, 4) == content
    assert (entry.bytes, entry.crc32c) == (len(content), f"{google_crc32c.value(content):08x}")
    assert (f"activations/x/c.{shard}.0", (start, stop), 7, "me") == (entry.path, entry.rows, entry.slice, entry.writer)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 276), max_size=12), order=st.randoms(use_true_random=False))
def test_blocks_of_any_size_in_any_order_give_the_same_bytes(tmp_path_factory, cuts, order):
    """The order and the size of blocks leave no trace in the file."""
    root = tmp_path_factory.mktemp("root")
    (root / "activations/x").mkdir(parents=True)
    rows = np.random.default_rng(0).integers(0, 65536, (276, 3), dtype="<u2")
    edges = [0, *sorted(cuts), 276]
    blocks = [(1024 + a, rows[a:b]) for a, b in pairwise(edges)]
    order.shuffle(blocks)
    _write(root, 1, blocks)
    assert _expected(rows, 2, 4) == (root / "activations/x/c.1.0").read_bytes()
    shutil.rmtree(root)


def test_a_shard_with_missing_rows_cannot_be_finished_and_leaves_nothing(root, random_rows):
    """The error names the rows, and no file stays behind."""
    rows = random_rows("bfloat16", (276, 3))
    with ShardWriter(root, LAYOUT.shard_file(1)) as writer:
        writer.write(1030, rows[:10])
        writer.write(1299, rows[:1])
        assert writer.missing() == [(1024, 1030), (1040, 1299)]
        with pytest.raises(InvalidInput) as error:
            writer.seal(slice_number=0, writer="")
    assert error.value.why == "1024 to 1029, 1040 to 1298"
    assert list((root / "activations/x").iterdir()) == []


@pytest.mark.parametrize(("row", "count"), [(1023, 2), (1299, 2), (0, 1), (1300, 1), (1100, 5)])
def test_rows_outside_of_the_shard_or_written_twice_are_refused(root, random_rows, row, count):
    """A plan that gives a row to two blocks, or to the wrong shard, does not go unnoticed."""
    rows = random_rows("bfloat16", (276, 3))
    with ShardWriter(root, LAYOUT.shard_file(1)) as writer:
        writer.write(1102, rows[:50])
        with pytest.raises(InvalidInput, match=r"not in this shard|written before"):
            writer.write(row, rows[:count])


def test_a_writer_that_was_taken_over_cannot_publish(root, random_rows):
    """A paused writer that wakes after a resume does not replace its successor's file."""
    rows = random_rows("bfloat16", (276, 3))
    with ShardWriter(root, LAYOUT.shard_file(1)) as paused:
        paused.write(1024, rows[::-1])
        paused.seal(slice_number=0, writer="paused")
        remove_partials(root, LAYOUT.shard_file(1))
        _write(root, 1, [(1024, rows)])
        with pytest.raises(Conflict, match="took over"):
            paused.publish()
    assert _expected(rows, 2, 4) == (root / "activations/x/c.1.0").read_bytes()
