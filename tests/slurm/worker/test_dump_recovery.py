"""Dumps that are cut off, whatever by, go on where they were: the dataset is that of an undisturbed run, file for file."""

from __future__ import annotations

import signal
import subprocess
import sys
import weakref

import pytest

from nnsight_hpc.slurm.worker import dump as dump_module
from nnsight_hpc.slurm.worker.model import Alone
from nnsight_hpc.slurm.worker.scribe import OwnScribe
from nnsight_hpc.storage import DatasetWriter, read_attributes
from nnsight_hpc.storage import share as share_module
from nnsight_hpc.storage.background import BackgroundThread
from nnsight_hpc.wire.errors import HpcError
from tests.slurm.worker.graphs import dump_frame
from tests.slurm.worker.stand_in import wait_for
from tests.slurm.worker.test_dump import LAYERS, on_device, run, texts
from tests.storage.contents import contents

FORMATS = ("zarr", "hdf5")


@pytest.fixture(scope="module")
def loaded(tiny_llama):
    return on_device(tiny_llama)


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(dump_module, "SLICE_ROWS", 256)


@pytest.mark.slow
def test_dumps_from_python_that_are_killed_at_any_step_go_on(tiny_llama, tmp_path):
    """SIGKILL before random ones of all that a dump does to files, six times in a row: then the next attempt completes it."""
    command = [sys.executable, "-m", "tests.slurm.worker.struck_dump", str(tiny_llama), str(tmp_path), "0"]
    killed = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=240).stdout
    assert int(killed) > 6
    assert sorted(one.name for one in (tmp_path / "killed").iterdir()) == ["set.hdf5", "set.zarr"]
    for form in FORMATS:
        assert contents(tmp_path / "undisturbed" / f"set.{form}") == contents(tmp_path / "killed" / f"set.{form}")


@pytest.mark.slow
@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(("form", "first"), [("zarr", "SIGUSR2"), ("hdf5", "SIGTERM")])
def test_a_requested_dump_goes_on_after_its_workers_have_ended(bench, loaded, tmp_path, form, first):
    """One worker is drained (walltime) or terminated (preemption) in the middle of it, and one is killed by SIGKILL."""
    frame = dump_frame(texts(60, (5, 60)), LAYERS, format=form, batch_tokens=128)
    program = "tests.slurm.worker.struck_worker"
    workers = [bench.worker(name, program=("-m", program, name)) for name in (first, "SIGKILL")]
    for attempt in (1, 2):
        request = bench.daemon.submit(frame, kind="dump", request="r-abcdefgh2345", attempt=attempt)
        wait_for(lambda ended=attempt: sum(one.poll() is not None for one in workers) == ended, "a worker's end")
        bench.daemon.queues.clear()  # a daemon takes back what a worker that has ended held
    assert not bench.daemon.outcomes[request]
    assert sorted(one.returncode for one in workers) == [-signal.SIGKILL, 0]
    path = bench.places.datasets / f"set.{form}"
    assert 0 < len(DatasetWriter(path).pending()) < read_attributes(path).slices
    run(frame, loaded, bench.places.datasets)
    run(frame, loaded, tmp_path / "undisturbed")
    assert contents(tmp_path / "undisturbed" / path.name) == contents(path)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_an_error_and_the_dump_goes_on_later(loaded, tmp_path, form):
    """On a full disk the dump fails in words and shows nothing as complete; with space it goes on."""
    small = tmp_path / "small"
    small.mkdir()
    frame = dump_frame(texts(150, (20, 60)), LAYERS, format=form)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], check=True)
    try:
        path = small / f"set.{form}"
        with pytest.raises(HpcError, match="the disk is full"):
            run(frame, loaded, small)
        assert not read_attributes(path).complete
        assert 0 < len(DatasetWriter(path).pending()) < read_attributes(path).slices
        subprocess.run(["mount", "-o", "remount,size=16m", small], check=True)
        run(frame, loaded, small)
        run(frame, loaded, tmp_path)
        assert contents(tmp_path / path.name) == contents(path)
    finally:
        subprocess.run(["umount", small], check=True)


def test_what_a_killed_attempt_has_left_is_removed_by_the_next(loaded, tmp_path):
    """What a dataset was made of before it had its name, and what was needed to write it once it is complete."""
    path, frame = tmp_path / "set.zarr", dump_frame(texts(5, (5, 9)), LAYERS)
    (tmp_path / ".set.zarr.0123abcd.partial" / "tokens").mkdir(parents=True)
    run(frame, loaded, tmp_path)
    whole = contents(path)
    for name in ("manifest", "staged"):
        (path / name).mkdir()
        (path / name / "slice-000000").touch()
    run(frame, loaded, tmp_path)
    assert whole == contents(path)
    assert list(tmp_path.iterdir()) == [path]


LIMIT = 16 << 10
"""Bytes that may wait for the writing thread: of a slice with three captures a sixth."""


class _SmallQueue(DatasetWriter):
    def __init__(self, path, **options):
        super().__init__(path, **{**options, "queue_bytes": LIMIT})


class _SlowDisk(BackgroundThread):
    """A thread that writes takes nothing before its queue has been full; `most` is what it has held in bytes."""

    most = 0

    def __init__(self, limit, name):
        self._slow = name == "dataset-writer"
        self._full = not self._slow
        super().__init__(limit, name)

    def submit(self, job, size):
        with self._changed:
            self._full = self._full or self._held + size > self._limit
            self._changed.notify_all()
        super().submit(job, size)
        if self._slow:
            _SlowDisk.most = max(_SlowDisk.most, self._held)

    def _next(self):
        with self._changed:
            self._changed.wait_for(lambda: self._full or self._closed)
        return super()._next()


@pytest.mark.usefixtures("small_slices")
def test_what_a_dump_holds_does_not_grow_with_the_corpus(loaded, tmp_path, monkeypatch):
    """However long the corpus, a full queue is all that waits for a slow disk, and a batch is let go before the next one."""
    monkeypatch.setattr(dump_module, "DatasetWriter", _SmallQueue)
    monkeypatch.setattr(share_module, "BackgroundThread", _SlowDisk)
    write, put, of_batches = Alone.write, OwnScribe.put, []

    def watched_write(self, program, **options):
        assert [one() for one in of_batches if one() is not None] == []
        write(self, program, **options)

    def watched_put(self, values):
        of_batches.extend(map(weakref.ref, values.values()))
        put(self, values)

    monkeypatch.setattr(Alone, "write", watched_write)
    monkeypatch.setattr(OwnScribe, "put", watched_put)
    peaks = []
    for documents in (40, 80):
        monkeypatch.setattr(_SlowDisk, "most", 0)
        run(dump_frame(texts(documents, (20, 20)), LAYERS, batch_tokens=80), loaded, tmp_path / str(documents))
        peaks.append(_SlowDisk.most)
    assert all(LIMIT // 2 < peak <= LIMIT for peak in peaks)
