import os
import shutil

import google_crc32c
import pytest

from nnsight_hpc.storage import ActivationDataset, FileSum, list_files, resolve_inside, verify_files
from nnsight_hpc.storage.checksums import file_sum
from nnsight_hpc.wire.errors import Conflict, CorruptData, InvalidInput


@pytest.fixture
def ds(tmp_path, write_dataset, random_rows):
    return write_dataset(
        tmp_path / "n.zarr",
        {"model.layers.3.output": ("float32", random_rows("float32", (700, 4)))},
        rows_per_slice=256,
    )


def test_the_list_is_every_file_of_the_dataset_with_its_true_checksum(ds):
    """Nothing is missing, nothing else is listed, and sizes and sums are those of the bytes."""
    files = {str(f.relative_to(ds.path)): f.read_bytes() for f in ds.path.rglob("*") if f.is_file()}
    expected = {FileSum(path, len(data), f"{google_crc32c.value(data):08x}") for path, data in files.items()}
    listed = list_files(ds.path)
    assert set(listed) == expected
    assert len(listed) == len(expected)


def test_the_list_is_the_same_every_time(ds):
    """Its order is fixed."""
    assert list_files(ds.path) == list_files(ds.path)


def test_a_copy_of_the_listed_files_is_a_dataset(ds, tmp_path):
    """The list is enough for a transfer, and verifies the copy."""
    copy = tmp_path / "copy.zarr"
    for file in list_files(ds.path):
        target = resolve_inside(copy, file.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ds.path / file.path, target)
    verify_files(copy, list_files(ds.path))
    name = "model.layers.3.output"
    assert ActivationDataset(copy)[name][:].tobytes() == ds[name][:].tobytes()


def test_damaged_metadata_of_a_copy_is_found(ds):
    """Small metadata files are checked as well as shards."""
    files = list_files(ds.path)
    path = ds.path / "tokens/zarr.json"
    path.write_bytes(path.read_bytes().replace(b"group", b"gruop"))
    with pytest.raises(CorruptData) as error:
        verify_files(ds.path, files)
    assert error.value.why.startswith("tokens/zarr.json: crc32c")


def test_an_incomplete_dataset_is_not_listed(tmp_path, create, random_rows):
    """Half a dataset is not transferred."""
    writer = create(tmp_path / "half.zarr", {"x": ("float32", random_rows("float32", (10, 4)))})
    with pytest.raises(Conflict, match="not complete"):
        list_files(writer.path)


def test_a_file_is_summed_in_blocks(tmp_path):
    """A file larger than a block, and an empty one, have the checksum of their bytes."""
    data = os.urandom((4 << 20) + 12345)
    (tmp_path / "large").write_bytes(data)
    (tmp_path / "empty").touch()
    assert file_sum(tmp_path, "large") == FileSum("large", len(data), f"{google_crc32c.value(data):08x}")
    assert file_sum(tmp_path, "empty") == FileSum("empty", 0, "00000000")


@pytest.mark.parametrize("path", ["", ".", "/etc/passwd", "../other", "a/../../other", "a\0b", "link/secret"])
def test_a_path_that_leads_out_of_the_dataset_is_refused(tmp_path, path):
    """A peer's path cannot name another file, not by a symbolic link either."""
    root = tmp_path / "n.zarr"
    root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInput):
        resolve_inside(root, path)


def test_a_path_inside_is_resolved(tmp_path):
    """Dots in names are no way out."""
    assert (
        resolve_inside(tmp_path, "activations/model.layers.3..x/c.0.0")
        == tmp_path / "activations/model.layers.3..x/c.0.0"
    )


def test_a_list_with_a_hostile_path_reads_nothing_outside(tmp_path):
    """Verification refuses a path that leads out."""
    with pytest.raises(InvalidInput):
        verify_files(tmp_path, [FileSum("../secret", 1, "00000000")])
