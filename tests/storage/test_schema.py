from pathlib import Path

import msgspec
import numpy as np
import pytest

from nnsight_hpc.storage import CaptureSpec, dataset_folder, read_attributes
from nnsight_hpc.storage.schema import LOGICAL_DTYPES, check_captures, fill_value, physical_dtype
from nnsight_hpc.wire.errors import CorruptData, Incompatible, InvalidInput, NotFound

BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc",
    "a\n",
    "-rf",
    ".hidden",
    "é",
    "a b",
    "x" * 101,
    "n.zarr",
    "c.partial",
    "a\0",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_be_a_path_or_a_hidden_file_is_refused(name):
    """A dataset's name cannot leave its folder."""
    with pytest.raises(InvalidInput, match="not a name for a dataset"):
        dataset_folder(Path("/scratch"), name)


@pytest.mark.parametrize("name", ["a", "resid.10_v-2", "9" * 100, "a..b"])
def test_a_plain_name_becomes_a_zarr_folder(name):
    """A good name is used as it is."""
    assert Path("/scratch") / (name + ".zarr") == dataset_folder(Path("/scratch"), name)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "__x", "zarr.json", "document", "a\n", "x" * 201])
def test_a_capture_name_that_is_no_zarr_node_or_is_reserved_is_refused(name):
    """Names that Zarr or a batch keeps for itself are refused."""
    with pytest.raises(InvalidInput, match="captures cannot be stored"):
        check_captures([CaptureSpec(name, (4,), "float32")])


def test_all_problems_of_the_captures_are_named_at_once():
    """One error lists every wrong capture."""
    with pytest.raises(InvalidInput) as error:
        check_captures(
            [CaptureSpec("a", (0,), "float32"), CaptureSpec("a", (4,), "complex64"), CaptureSpec("b/c", (), "int8")]
        )
    assert all(text in error.value.why for text in ("(0,)", "complex64", "'b/c'", "2 times"))


def test_a_dataset_needs_a_capture():
    """No captures at all are refused."""
    with pytest.raises(InvalidInput, match="there are none"):
        check_captures([])


@pytest.mark.parametrize("logical", LOGICAL_DTYPES)
def test_a_fill_value_is_representable_and_never_zero(logical):
    """What is missing cannot pass for an activation of 0."""
    filled = np.full(1, fill_value(logical), dtype=physical_dtype(logical))[0]
    assert filled != 0


def test_a_folder_without_a_dataset_is_not_found(tmp_path):
    """An empty folder, a file and nothing are all no dataset."""
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(NotFound, match="there is no dataset"):
            read_attributes(path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"{", CorruptData),
        (b"\xff", CorruptData),
        (b"[]", CorruptData),
        (b'{"attributes": {"format": "other"}}', Incompatible),
        (b'{"attributes": {"format": "nnsight-hpc-activations", "format_version": 2}}', Incompatible),
        (b'{"attributes": {"format": "nnsight-hpc-activations", "format_version": 1, "rows": "x"}}', CorruptData),
    ],
)
def test_metadata_that_cannot_be_used_is_refused_with_its_file(tmp_path, content, error):
    """Damaged, foreign and later metadata each raise their own error."""
    (tmp_path / "zarr.json").write_bytes(content)
    with pytest.raises(error) as raised:
        read_attributes(tmp_path)
    assert str(tmp_path) in raised.value.where


def test_attributes_survive_json(tmp_path, write_dataset, random_rows):
    """What the root group says decodes to the same attributes."""
    ds = write_dataset(tmp_path / "n.zarr", {"x": ("int8", random_rows("int8", (5, 3)))})
    again = msgspec.json.decode(msgspec.json.encode(ds.attributes), type=type(ds.attributes))
    assert ds.attributes == again
