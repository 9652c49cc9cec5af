import json

import pytest

from nnsight_hpc.storage import CaptureSpec
from nnsight_hpc.storage.create import _capture_layouts
from nnsight_hpc.storage.layout import ArrayLayout, dataset_layouts, shard_rows, table_layout
from nnsight_hpc.wire.errors import CorruptData, Incompatible

MIB = 1 << 20


def _sizes(tokens):
    return {"token": tokens, "document": 100}


@pytest.mark.parametrize(
    ("width", "dtype"), [(576, "bfloat16"), (2048, "bfloat16"), (4096, "float32"), (8192, "bfloat16")]
)
def test_chunks_and_shards_of_a_large_dataset_have_the_sizes_that_were_measured_to_be_good(width, dtype):
    """Chunks have 256 to 1,024 rows in about 1 to 4 MiB, shards 256 MiB to 1 GiB."""
    layouts, slice_rows = _capture_layouts([CaptureSpec("x", (width,), dtype)], _sizes(10**8), None, 512 * MIB, "zarr")
    layout = layouts[0]
    assert 256 <= layout.chunk_rows <= 1024
    assert MIB <= layout.chunk_rows * layout.row_bytes <= 4 * MIB
    assert 256 * MIB <= layout.shard_bytes(0) <= 1024 * MIB
    assert layout.shard_rows == slice_rows


def test_captures_of_different_widths_share_the_borders_of_their_shards():
    """One slice is whole shards of every capture."""
    specs = [
        CaptureSpec("wide", (8192,), "float32"),
        CaptureSpec("narrow", (), "float16"),
        CaptureSpec("mid", (12, 64), "bfloat16"),
    ]
    layouts, slice_rows = _capture_layouts(specs, _sizes(10**7), 50_000, 512 * MIB, "zarr")
    assert {layout.shard_rows for layout in layouts} == {layouts[0].shard_rows}
    assert slice_rows % layouts[0].shard_rows == 0
    assert slice_rows >= 50_000
    assert all(layout.shard_rows % layout.chunk_rows == 0 for layout in layouts)


def test_a_row_that_is_larger_than_a_shard_should_be_still_fits():
    """Logits of a large vocabulary give shards of the smallest number of rows."""
    layouts, _ = _capture_layouts([CaptureSpec("logits", (16, 128_000), "float32")], _sizes(5000), None, MIB, "zarr")
    assert (layouts[0].chunk_rows, layouts[0].shard_rows) == (256, 256)


def test_a_small_dataset_is_one_shard_no_larger_than_it_needs():
    """Ten rows do not make a shard of half a gigabyte."""
    layouts, _ = _capture_layouts([CaptureSpec("x", (8,), "float32")], _sizes(10), None, 512 * MIB, "zarr")
    assert (layouts[0].chunk_rows, layouts[0].shard_rows, layouts[0].shards) == (256, 256, 1)


def test_tokens_get_large_chunks_and_several_shards():
    """A billion tokens lie in few files and few chunks."""
    layout = table_layout("tokens/input_ids", (10**9,), "int32", "zarr")
    assert (layout.chunk_rows, layout.shard_rows, layout.shards) == (1 << 16, 1 << 24, 60)


def test_the_last_shard_holds_whole_chunks_only_as_far_as_the_rows_go():
    """Sizes follow from the rows: 3 chunks of 4 in the last shard, and the full index."""
    layout = ArrayLayout("activations/x", (1024 + 600, 2), "float32", 256, 1024)
    assert (layout.shards, layout.shard_bounds(1), layout.shard_file(1).chunks) == (2, (1024, 1624), 3)
    assert layout.shard_bytes(1) == 3 * 256 * 8 + 4 * 16 + 4
    assert layout.shard_path(1) == "activations/x/c.1.0"


def test_shard_rows_never_exceed_the_target_once_a_unit_fits():
    """The power of two is the largest that fits."""
    assert shard_rows(8192, 10**9, 256, 32 * MIB) == 4096
    assert shard_rows(8192, 10**9, 256, 63 * MIB) == 4096


def _damage(path, change):
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: m["codecs"][0]["configuration"]["codecs"].append({"name": "zstd"}), Incompatible),
        (lambda m: m["codecs"][0]["configuration"].update(index_location="start"), Incompatible),
        (lambda m: m["codecs"][0]["configuration"]["codecs"][0]["configuration"].update(endian="big"), Incompatible),
        (lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[256, 2]), CorruptData),
        (lambda m: m.update(codecs=[]), CorruptData),
        (lambda m: m.update(shape=[9, 4]), CorruptData),
        (lambda m: m.update(data_type="float32"), CorruptData),
        (lambda m: m["attributes"].update(logical_dtype="float16"), CorruptData),
        (lambda m: m["attributes"].clear(), CorruptData),
    ],
)
def test_array_metadata_that_does_not_fit_is_refused_with_its_file(tmp_path, write_dataset, random_rows, change, error):
    """An array that is stored in another way, or whose metadata is damaged, is not misread."""
    ds = write_dataset(tmp_path / "n.zarr", {"x": ("bfloat16", random_rows("bfloat16", (10, 4)))})
    file = ds.path / "activations/x/zarr.json"
    _damage(file, change)
    with pytest.raises(error) as raised:
        dataset_layouts(ds.path, ds.attributes)
    assert str(file) == raised.value.where


def test_a_missing_array_is_corrupt_data(tmp_path, write_dataset, random_rows):
    """A capture without its folder is named."""
    ds = write_dataset(tmp_path / "n.zarr", {"x": ("int8", random_rows("int8", (10, 4)))})
    (ds.path / "activations/x").rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptData, match="activations/x"):
        dataset_layouts(ds.path, ds.attributes)
