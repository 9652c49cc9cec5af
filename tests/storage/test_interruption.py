"""Killed writers, full disks, slow disks."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from nnsight_hpc.storage import ActivationDataset
from nnsight_hpc.wire.errors import Conflict, HpcError
from tests.storage.killed_writer import finish_killed, write_until_killed


def _shard_bytes(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("c.*"))}


def test_a_writer_killed_in_the_middle_of_a_slice_is_resumed_to_identical_bytes(
    tmp_path, create, write_slice, write_dataset, random_rows
):
    """After SIGKILL the finished slices stand, the dataset is refused, and a resume gives what an unbroken run gives."""
    data = {"x": ("bfloat16", random_rows("bfloat16", (5000, 64)))}
    options = {"rows_per_slice": 2048, "shard_bytes": 1}
    path = tmp_path / "killed.zarr"
    create(path, data, **options)
    write_until_killed(path, data["x"][1])

    assert len(list((path / "activations/x").glob("c.2.0.*.partial"))) == 1  # a full shard of an unfinished slice
    assert sorted(f.name for f in (path / "activations/x").glob("c.*") if f.suffix != ".partial") == ["c.0.0", "c.1.0"]
    finish_killed(path, write_slice, data)

    unbroken = write_dataset(tmp_path / "unbroken.zarr", data, **options)
    assert list(path.rglob("*.partial")) == []
    assert _shard_bytes(unbroken.path) == _shard_bytes(path)
    ActivationDataset(path).verify()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing_that_looks_complete(
    small_disk, create, write_slice, random_rows
):
    """ENOSPC names the place and the way on; finished slices stay, and with more space the dump goes on."""
    data = {"x": ("float32", random_rows("float32", (6000, 256)))}
    writer = create(small_disk / "n.zarr", data, rows_per_slice=2048)
    write_slice(writer, 0, data)
    with pytest.raises(HpcError, match="the disk is full") as error:
        write_slice(writer, 1, data)
    assert "resume" in error.value.next
    assert [part.number for part in writer.pending()] == [1, 2]
    assert sorted(file.name for file in (writer.path / "activations/x").iterdir()) == ["c.0.0", "zarr.json"]
    with pytest.raises(Conflict, match="not whole"):
        writer.finish()
    subprocess.run(["mount", "-o", "remount,size=32m", small_disk], check=True)
    for part in writer.pending():
        write_slice(writer, part.number, data)
    writer.finish()
    assert data["x"][1].tobytes() == ActivationDataset(writer.path)["x"][:].tobytes()


def test_a_disk_that_is_full_from_the_start_leaves_no_dataset(small_disk, create):
    """A dataset whose tokens do not fit is not created at all."""
    rows = np.zeros((2_000_000, 1), dtype=np.int8)
    with pytest.raises(HpcError, match="the disk is full"):
        create(small_disk / "n.zarr", {"x": ("int8", rows)})
    assert list(small_disk.iterdir()) == []


def test_a_folder_that_turns_read_only_is_a_clear_error(small_disk, create, write_slice, random_rows):
    """Errors of the operating system come as our own, with the path."""
    data = {"x": ("float32", random_rows("float32", (100, 4)))}
    writer = create(small_disk / "n.zarr", data)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(HpcError, match="cannot be written") as error:
        write_slice(writer, 0, data)
    assert "Read-only" in error.value.why


_WRITER_OF_MANY_BLOCKS = """
    import sys
    import numpy as np
    from nnsight_hpc.storage import CaptureSpec, DatasetWriter, Provenance, TokenTable
    rows, width = 300_000, 1024
    tokens = TokenTable(np.zeros(rows, dtype=np.int32), np.array([0, rows]), ["a"])
    captures = [CaptureSpec("x", (width,), "bfloat16")]
    writer = DatasetWriter.create(sys.argv[1], captures=captures, tokens=tokens, provenance=Provenance(model="m"),
                                  queue_bytes=int(sys.argv[2]), rows_per_slice=rows)
    block = np.ones((1000, width), dtype=np.uint16)
    with writer.slice(0) as s:
        for at in range(0, rows, 1000):
            s.write("x", at, block)
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def _peak_memory(path, queue_bytes):
    """Peak resident bytes of a process that writes 600 MB as fast as it can (of its own memory map: VmHWM)."""
    command = [sys.executable, "-c", textwrap.dedent(_WRITER_OF_MANY_BLOCKS), path, str(queue_bytes)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(output.split()[1]) * 1024


def test_the_memory_of_a_writer_is_bounded_by_its_queue(tmp_path):
    """A producer faster than the disk is held back: 600 MB pass through a queue of 16 MiB."""
    peak = _peak_memory(tmp_path / "n.zarr", 16 << 20)
    assert peak < 150 << 20
