"""Datasets in dask and xarray, which the user installs: ``pip install "dask[array]" xarray``.

What a chunk of a dask array or a part of an xarray variable needs is read when it is computed. bfloat16 stays
`ml_dtypes.bfloat16`, in which NumPy computes slowly, and not with every function: ``.astype("float32")`` first.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from nnsight_hpc.storage.layout import BLOCK_ROWS
from nnsight_hpc.wire.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from collections.abc import Mapping

    import dask.array
    import xarray

    from nnsight_hpc.storage.arrays import StoredArray
    from nnsight_hpc.storage.schema import Provenance

_CHUNK_BYTES = 64 << 20


def dask_array(array: StoredArray, rows_at_once: int | None) -> dask.array.Array:
    """`array` in chunks of `rows_at_once` rows and the whole width; about 64 MiB, whole blocks of 256 rows, when None.

    Raises
    ------
    NotFound
        dask is not installed.
    InvalidInput
        `rows_at_once` is less than 1.
    """
    da = _installed("dask.array", 'pip install "dask[array]"')
    rows = max(1, _CHUNK_BYTES // array.row_bytes // BLOCK_ROWS) * BLOCK_ROWS if rows_at_once is None else rows_at_once
    if rows < 1:
        raise InvalidInput("rows_at_once must be at least 1")
    meta = np.empty((0,) * array.ndim, dtype=array.dtype)
    lazy: dask.array.Array = da.from_array(array, chunks=(rows, *array.shape[1:]), name=False, meta=meta)
    return lazy


def xarray_dataset(
    captures: Mapping[str, StoredArray], tokens: Mapping[str, StoredArray], provenance: Provenance
) -> xarray.Dataset:
    """Captures as variables ``(token, …)``, tokens as coordinates along ``token``, the provenance as attributes.

    Trailing dimensions are ``<capture>_1``, ``<capture>_2``, …, since captures differ in width.

    Raises
    ------
    NotFound
        xarray is not installed.
    """
    xr = _installed("xarray", "pip install xarray")
    from nnsight_hpc.storage.in_xarray import variable  # noqa: PLC0415  (xarray is there now)

    dataset: xarray.Dataset = xr.Dataset(
        {name: variable(array, name) for name, array in captures.items()},
        coords={name: variable(array, name) for name, array in tokens.items()},
        attrs={key: value for key, value in msgspec.to_builtins(provenance).items() if value},
    )
    return dataset


def _installed(module: str, command: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise NotFound(f"{module.partition('.')[0]} is not installed", why=str(error), next=command) from error
