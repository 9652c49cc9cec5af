"""Arrays on disk beside plain Zarr and NumPy, which are right by definition."""

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnsight_hpc.storage import ActivationDataset
from nnsight_hpc.storage.files import LocalFiles
from nnsight_hpc.storage.schema import LOGICAL_DTYPES
from nnsight_hpc.wire.errors import CorruptData, HpcError, InvalidInput, NotFound

ROWS = 1000
_MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def wide(tmp_path, write_dataset, random_rows):
    """One shard of 256 rows after another; a row of 40 KiB, so that not every gap is read over."""
    return write_dataset(
        tmp_path / "n.zarr", {"x": ("uint8", random_rows("uint8", (ROWS, 40 << 10)))}, rows_per_slice=256
    )


@pytest.fixture
def counted(monkeypatch):
    """The reads of files, as (path, offset, bytes)."""
    reads, read_into = [], LocalFiles.read_into

    def count(self, path, offset, memory):
        reads.append((path, offset, len(memory)))
        read_into(self, path, offset, memory)

    monkeypatch.setattr(LocalFiles, "read_into", count)
    return reads


@pytest.mark.parametrize("logical", LOGICAL_DTYPES)
def test_every_dtype_reads_as_plain_zarr_reads_it(tmp_path, write_dataset, random_rows, logical):
    """Slices, steps, numbers and masks give the bits that zarr-python gives, in the dtype that the capture states."""
    ds = write_dataset(tmp_path / "n.zarr", {"x": (logical, random_rows(logical, (ROWS, 2, 3)))}, rows_per_slice=256)
    plain = zarr.open_array(str(ds.path / "activations" / "x"), mode="r")[:]
    mask = np.random.default_rng(0).random(ROWS) < 0.3
    for key in (slice(None), slice(250, 260), slice(990, 3, -7), [5, -1, 300, 5], mask, mask.tolist()):
        assert plain[key].tobytes() == ds["x"][key].tobytes(), key
    assert ds["x"].dtype.name == logical


@_MANY
@given(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS) | st.just([False] * ROWS) | st.just([True] * ROWS))
def test_masks_choose_rows_as_in_numpy(wide, mask):
    """A mask gives the rows where it is true, in order."""
    expected = np.asarray(zarr.open_array(str(wide.path / "activations" / "x"), mode="r")[:, :8])[np.array(mask)]
    np.testing.assert_array_equal(expected, wide["x"][np.array(mask), :8])


def test_neighbours_are_read_at_once_and_gaps_only_where_they_are_small(wide, counted):
    """Sorted reads: two rows 40 KiB apart are one read, two rows 80 KiB apart are two; whatever the order asked for."""
    row = 40 << 10
    wide["x"][[7, 3, 5, 4, 9]]
    assert counted == [("activations/x/c.0.0", 3 * row, 3 * row), ("activations/x/c.0.0", 7 * row, row),
                       ("activations/x/c.0.0", 9 * row, row)]  # fmt: skip


def test_chosen_rows_are_read_in_bounded_spans(wide, counted):
    """Half of the rows are read through, but never more than 8 MiB at once."""
    wide["x"][np.arange(0, ROWS)[::-1]]
    assert max(size for _, _, size in counted) <= 8 << 20
    assert sum(size for _, _, size in counted) == ROWS * (40 << 10)


def test_no_rows_are_no_read(wide, counted):
    """An empty slice, list or mask opens no file, wherever it lies."""
    for key in (slice(5, 5), slice(ROWS, None), slice(5, 9, -1), [], np.zeros(ROWS, dtype=bool)):
        assert wide["x"][key].shape == (0, 40 << 10)
    assert counted == []


def test_values_convert_only_where_none_changes(tmp_path, write_dataset, random_rows):
    """bfloat16 becomes float32 when asked to; float16, which lacks its range, is refused with the way around it."""
    ds = write_dataset(tmp_path / "n.zarr", {"x": ("bfloat16", random_rows("bfloat16", (300, 4)))})
    assert ds["x"].to_numpy().dtype.name == "bfloat16"
    converted = ds["x"].to_numpy([3, 299], np.float32)
    assert converted.dtype == np.float32
    np.testing.assert_array_equal(ds["x"][[3, 299]].astype(np.float32), converted)
    with pytest.raises(InvalidInput, match="float16 does not hold every value of bfloat16"):
        ds["x"].to_numpy(dtype=np.float16)


def test_what_the_file_system_refuses_is_an_error_of_ours(tmp_path):
    """A folder where a file should be cannot be read; the message names it and says why."""
    (tmp_path / "c.0").mkdir()
    with pytest.raises(HpcError, match="cannot be read") as error:
        LocalFiles(tmp_path).read_into("c.0", 0, memoryview(bytearray(4)))
    assert (str(tmp_path / "c.0"), "Is a directory") == (error.value.where, error.value.why.split("] ")[1])
    assert not isinstance(error.value, CorruptData)


def test_a_gap_that_is_missing_is_not_read_over(tmp_path, create, write_slice, random_rows):
    """Rows on both sides of a slice that is not written yet can be asked for together."""
    data = {"x": ("float32", random_rows("float32", (ROWS, 4)))}
    writer = create(tmp_path / "n.zarr", data, rows_per_slice=256)
    for number in (0, 2):
        write_slice(writer, number, data)
    array = ActivationDataset(writer.path, allow_incomplete=True)["x"]
    assert data["x"][1][[255, 512]].tobytes() == array[[255, 512]].tobytes()
    with pytest.raises(NotFound, match="does not have rows"):
        array[[255, 256, 512]]
