"""The notebook and the guide about datasets run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ml_dtypes import bfloat16

from nnsight_hpc.storage import CaptureSpec, DatasetWriter, Provenance, TokenTable
from nnsight_hpc.storage.schema import physical_dtype

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "train_sae.ipynb"
GUIDE = ROOT / "docs" / "guides" / "datasets.md"
ROWS, WIDTH = 8192, 32


@pytest.fixture
def sparse_rows():
    """Rows that are sums of three of 64 directions, the bits of bfloat16."""
    random = np.random.default_rng(0)
    directions = random.standard_normal((64, WIDTH))
    strengths = np.zeros((ROWS, 64))
    np.put_along_axis(strengths, random.integers(0, 64, (ROWS, 3)), 1 + random.random((ROWS, 3)), axis=1)
    return (strengths @ directions).astype(bfloat16).view(physical_dtype("bfloat16"))


def test_the_notebook_trains_a_sparse_autoencoder(tmp_path, monkeypatch, write_dataset, sparse_rows):
    """Its cells run in order on a dataset of that name; most of the variance is explained at the end."""
    ds = write_dataset(tmp_path / "run1.zarr", {"resid_10": ("bfloat16", sparse_rows)})
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    names = {}
    with torch.random.fork_rng():
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    assert np.count_nonzero(ds.tokens.position[:]) == names["batches"].rows
    assert np.mean(names["unexplained"][:3]) > 0.8
    assert np.mean(names["unexplained"][-10:]) < 0.4
    assert 0 <= names["document"].index < ds.documents
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_the_guide_to_reading_runs(tmp_path, monkeypatch, sparse_rows):
    """Its Python blocks, in order, on a dataset with the names that they use."""
    tokens = TokenTable(
        np.zeros(ROWS, dtype=int), np.arange(0, ROWS + 1, 256), [f"article-{i}" for i in range(ROWS // 256)]
    )
    capture = CaptureSpec("model.layers.3.output", (WIDTH,), "bfloat16")
    path = tmp_path / "run1.zarr"
    writer = DatasetWriter.create(path, captures=[capture], tokens=tokens, provenance=Provenance(model="test"))
    with writer.slice(0) as s:
        s.write(capture.name, 0, sparse_rows)
    writer.finish()
    monkeypatch.chdir(tmp_path)
    section = GUIDE.read_text("utf-8").partition("\n## Read\n")[2].partition("\n## ")[0]
    names = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(compile(block, str(GUIDE), "exec"), names)
    assert names["batches"].rows == ROWS - ROWS // 256
    np.testing.assert_allclose(sparse_rows.view(bfloat16).astype("float32").mean(axis=0), names["mean"], rtol=1e-4)
    assert names["first"].shape == (100, WIDTH)
