"""xarray and dask see what NumPy sees, and read it when it is computed."""

import subprocess
import sys

import numpy as np
import pytest

from nnsight_hpc.storage.files import LocalFiles
from nnsight_hpc.wire.errors import InvalidInput

ROWS = 1000


@pytest.fixture
def ds(tmp_path, write_dataset, random_rows):
    data = {"x": ("int16", random_rows("int16", (ROWS, 6))), "b": ("bfloat16", random_rows("bfloat16", (ROWS, 2, 3)))}
    return write_dataset(tmp_path / "n.zarr", data, rows_per_slice=256)


@pytest.fixture
def read_bytes(monkeypatch):
    """How many bytes each read of a file has asked for."""
    sizes, read_into = [], LocalFiles.read_into

    def count(self, path, offset, memory):
        sizes.append(len(memory))
        read_into(self, path, offset, memory)

    monkeypatch.setattr(LocalFiles, "read_into", count)
    return sizes


def test_a_dask_array_computes_as_numpy(ds, read_bytes):
    """Chunks of rows, nothing read before `compute`, and of the chunks only those that are needed."""
    lazy = ds["x"].to_dask(rows_at_once=300)
    assert ((300, 300, 300, 100), (6,), np.dtype("int16")) == (*lazy.chunks, lazy.dtype)
    assert read_bytes == []
    part = lazy[310:320].compute()
    assert sum(read_bytes) <= 300 * 12
    np.testing.assert_array_equal(ds["x"][310:320], part)
    np.testing.assert_array_equal(ds["x"][:].astype("int64").sum(axis=0), lazy.astype("int64").sum(axis=0).compute())


def test_dask_chunks_are_whole_blocks_by_default(ds):
    """About 64 MiB of whole blocks of 256 rows; bfloat16 is computed as float32."""
    lazy = ds["b"].to_dask()
    assert lazy.chunks == ((ROWS,), (2,), (3,))
    np.testing.assert_array_equal(ds["b"][:].astype("float32"), lazy.astype("float32").compute())
    with pytest.raises(InvalidInput):
        ds["b"].to_dask(rows_at_once=0)


def test_an_xarray_dataset_is_lazy_and_labelled(ds, read_bytes):
    """Captures are variables, tokens are coordinates, the provenance is in the attributes; parts are read when needed."""
    lazy = ds.to_xarray()
    assert dict(lazy.sizes) == {"token": ROWS, "x_1": 6, "b_1": 2, "b_2": 3}
    assert ({"input_ids", "document", "position"}, "test") == (set(lazy.coords), lazy.attrs["model"])
    assert read_bytes == []
    part = lazy["x"].isel(token=slice(500, 510), x_1=[0, 3]).to_numpy()
    assert sum(read_bytes) <= 10 * 12
    np.testing.assert_array_equal(ds["x"][500:510, [0, 3]], part)
    np.testing.assert_array_equal(ds["x"][[9, 3, 7]], lazy["x"].isel(token=[9, 3, 7]).to_numpy())
    np.testing.assert_array_equal(ds["b"][5].astype("float32"), lazy["b"].isel(token=5).astype("float32").to_numpy())
    np.testing.assert_array_equal(ds.tokens.position[:], lazy["position"].to_numpy())
    assert list(ds.to_xarray(["x"])) == ["x"]


@pytest.mark.parametrize(("package", "call"), [("dask", 'ds["x"].to_dask()'), ("xarray", "ds.to_xarray()")])
def test_without_the_package_the_error_names_it(ds, package, call):
    """The rest works, and the message says what to install."""
    code = f"""
import sys
sys.modules["{package}"] = None
from nnsight_hpc.storage import ActivationDataset
from nnsight_hpc.wire.errors import NotFound
ds = ActivationDataset({str(ds.path)!r})
try:
    {call}
except NotFound as error:
    print(error.what, error.next, sep=": ")
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.startswith(f"{package} is not installed: pip install")
