"""A stored array as a lazy variable of xarray; the one module of this package that loads xarray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

if TYPE_CHECKING:
    import numpy.typing as npt

    from nnsight_hpc.storage.arrays import StoredArray


class _Rows(BackendArray):
    """What xarray asks when values are needed; see "How to add a new backend" in its documentation."""

    def __init__(self, array: StoredArray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> npt.NDArray[Any]:
        support = indexing.IndexingSupport.OUTER_1VECTOR
        rows: npt.NDArray[Any] = indexing.explicit_indexing_adapter(key, self.shape, support, self.array.__getitem__)
        return rows


def variable(array: StoredArray, name: str) -> xr.Variable:
    """`array` with the dimensions ``token``, ``<name>_1``, ``<name>_2``, …."""
    dimensions = ("token", *(f"{name}_{axis}" for axis in range(1, array.ndim)))
    return xr.Variable(dimensions, indexing.LazilyIndexedArray(_Rows(array)))
