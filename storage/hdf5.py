"""HDF5 files that hold one contiguous dataset, and the index that joins them; the one module that loads h5py.

HDF5 itself writes a file's header, and nothing else: the rows are written behind it by position, as into a Zarr shard.
So a process that is killed leaves no file that HDF5 cannot open, blocks may come in any order without a trace in the
file, and reading needs no h5py. Measured on a memory file system, h5py's own writes of chunks reach half the speed.
"""

from __future__ import annotations

import os
from secrets import token_hex
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.storage.layout import Hdf5Array, Hdf5Arrays
from nnsight_hpc.storage.schema import FILE_MODE, METADATA, fill_value
from nnsight_hpc.wire.errors import Incompatible
from nnsight_hpc.wire.files import sync_folder, write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nnsight_hpc.storage.layout import ArrayLayout, RowsFile
    from nnsight_hpc.storage.schema import DatasetAttributes

ROWS = "rows"
"""Name of the dataset in a shard file."""
INDEX = "index.h5"
"""The file whose virtual datasets join the shards, below the root of a complete dataset."""


def create_rows_file(path: Path, planned: RowsFile) -> None:
    """Create an HDF5 file of full size with the dataset ``rows``, whose values are still holes.

    Raises
    ------
    Incompatible
        The HDF5 library lays files out otherwise than the specification of datasets says.
    """
    try:
        offset = _create(path, planned)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    if (offset, path.stat().st_size) != (planned.data_offset, planned.bytes):
        path.unlink()
        raise Incompatible(
            "the HDF5 library lays files out otherwise than the one that this program was made with",
            where=str(path),
            why=f"rows begin at byte {offset}, planned is {planned.data_offset}",
            next="use another version of h5py, or write Zarr",
        )


def _create(path: Path, planned: RowsFile) -> int:
    """Create the file, and return the byte at which the rows begin."""
    import h5py  # noqa: PLC0415  (the daemon and readers need not load it)
    import numpy as np  # noqa: PLC0415  (nor this)

    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    layout.set_obj_track_times(False)
    space = h5py.h5s.create_simple((planned.stop - planned.start, *planned.array.width_shape))
    with h5py.File(path, "x", libver="earliest", locking=False) as file:  # its name is this process's own
        kind = h5py.h5t.py_create(planned.array.physical)
        rows = h5py.h5d.create(file.id, ROWS.encode(), kind, space, layout)
        h5py.Dataset(rows).attrs["logical_dtype"] = np.bytes_(planned.array.dtype)  # of fixed size: no heap of strings
        return int(rows.get_offset())


def write_metadata(root: Path, attributes: DatasetAttributes, layouts: Sequence[ArrayLayout]) -> None:
    """Make the folders of a new dataset, and its ``dataset.json``."""
    for layout in layouts:
        (root / layout.path).mkdir(parents=True)
    arrays = tuple(Hdf5Array(array.path, array.shape, array.dtype, array.shard_rows) for array in layouts)
    metadata = {"attributes": attributes, **msgspec.to_builtins(Hdf5Arrays(arrays))}
    content = msgspec.json.format(msgspec.json.encode(metadata), indent=2)
    write_atomically(root / METADATA["hdf5"], content, mode=FILE_MODE)


def write_index(root: Path, attributes: DatasetAttributes, layouts: Sequence[ArrayLayout]) -> None:
    """Write ``index.h5``: every array as one virtual dataset, and the provenance as JSON."""
    import h5py  # noqa: PLC0415  (as above)

    partial = root / f"{INDEX}.{token_hex(4)}.partial"
    with h5py.File(partial, "x", locking=False) as file:
        file["provenance"] = msgspec.json.encode(attributes.provenance).decode()  # an attribute holds 64 KiB at most
        for layout in layouts:
            joined = h5py.VirtualLayout(layout.shape, dtype=layout.physical)
            for shard in layout.shard_files(0, layout.rows):
                shape = (shard.stop - shard.start, *layout.width_shape)
                joined[shard.start : shard.stop] = h5py.VirtualSource(shard.path, ROWS, shape)
            dataset = file.create_virtual_dataset(layout.path, joined, fillvalue=fill_value(layout.dtype))
            dataset.attrs["logical_dtype"] = layout.dtype
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.rename(root / INDEX)
    sync_folder(root)
