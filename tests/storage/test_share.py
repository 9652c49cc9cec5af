import numpy as np
import pytest

from nnsight_hpc.storage import ActivationDataset
from nnsight_hpc.storage import share as share_module
from nnsight_hpc.storage.share import ShareWriter
from nnsight_hpc.wire.errors import InvalidInput


@pytest.mark.parametrize(
    ("form", "steps"),
    [("zarr", {"_SYNC_BYTES": 5000}), ("hdf5", {"_SYNC_BYTES": 5000}), ("zarr", {"_UNSYNCED_BYTES": 100_000})],
)
def test_rows_of_many_ranges_in_one_block_come_back_with_their_checksums(
    *, tmp_path, create, random_rows, monkeypatch, form, steps
):
    """Ranges side by side, out of order and across shards, whose rows share pages; what the disk has is let go at once."""
    for name, size in steps.items():
        monkeypatch.setattr(share_module, name, size)
    rows = random_rows("float32", (3000, 301))
    writer = create(tmp_path / f"n.{form}", {"x": ("float32", rows)}, rows_per_slice=3000, shard_bytes=1)
    order = np.random.default_rng(0).permutation(30).repeat(2) * 2 + np.tile([0, 1], 30)
    plan = writer.plan(0)
    plan.begin()
    share = ShareWriter(plan, "me")
    for batch in order.reshape(10, 6):
        ranges = [(50 * number, 50 * number + 50) for number in batch.tolist()]
        share.hand_over("x", ranges, np.concatenate([rows[start:stop] for start, stop in ranges]))
    entries = share.seal()
    share.publish()
    share.close()
    plan.commit(entries)
    writer.finish()
    assert len(plan.files) == 3
    dataset = ActivationDataset(writer.path)
    assert rows.tobytes() == dataset["x"][:].tobytes()
    dataset.verify()


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(256, 266)], "shape"),
        ([(256, 257), (260, 262)], "shape"),
        ([], "shape"),
        ([(510, 514)], "rows 510 to 513 are not in slice 1"),
        ([(256, 258), (254, 256)], "rows 254 to 255 are not in slice 1"),
    ],
)
def test_a_block_that_does_not_hold_its_ranges_is_refused(*, tmp_path, create, random_rows, ranges, message):
    """Other than its four rows, or rows of another slice, are the caller's error; nothing is left of it."""
    writer = create(tmp_path / "n.zarr", {"x": ("float32", random_rows("float32", (1000, 4)))}, rows_per_slice=256)
    plan = writer.plan(1)
    plan.begin()
    share = ShareWriter(plan, "me")
    with pytest.raises(InvalidInput, match=message):
        share.hand_over("x", ranges, np.zeros((4, 4), dtype=np.float32))
    share.close()
    assert [file.name for file in (writer.path / "activations/x").iterdir()] == ["zarr.json"]
