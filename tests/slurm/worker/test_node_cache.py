"""Copies of a model on a node's own disk: made once by all together, used again, and never a reason to fail."""

from __future__ import annotations

import fcntl
import os
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from nnsight_hpc import models
from nnsight_hpc.execution.values import unpack_values
from nnsight_hpc.slurm.worker import node_cache
from nnsight_hpc.slurm.worker.control import Control
from nnsight_hpc.slurm.worker.loading import _load_alone
from nnsight_hpc.slurm.worker.node_cache import local_copy
from nnsight_hpc.wire.pools import PoolSpec
from tests.slurm.worker.graphs import capture_frame
from tests.slurm.worker.stand_in import wait_for

FILES, NUMBERS = 4, 1000
WEEK = 7 * 86400


@pytest.fixture
def source(tmp_path):
    """A folder like that of a model whose weights lie in several files."""
    folder = tmp_path / "model"
    folder.mkdir()
    for number in range(FILES):
        save_file({f"w{number}": torch.full((NUMBERS,), float(number))}, folder / f"model-{number}.safetensors")
    (folder / "config.json").write_text('{"model_type": "none"}')
    (folder / "pytorch_model.bin").write_bytes(b"a pickle, which nobody reads")
    return folder


def copy(source, cache, *, seen=None, leave=lambda: False, turn=0):
    moved = (lambda there, total: seen.append((there, total))) if seen is not None else (lambda _there, _total: None)
    return local_copy(source, str(cache), moved=moved, leave=leave, turn=turn)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


def test_the_first_start_copies_and_the_second_uses_it(source, tmp_path):
    """The copy has what loading needs and no pickles; its bytes are reported as they come, and not moved again."""
    seen: list[tuple[int, int]] = []
    made = copy(source, tmp_path / "disk", seen=seen)
    total = sum(file.stat().st_size for file in made.iterdir())
    assert made.is_relative_to(tmp_path / "disk")
    assert contents(source) == contents(made)
    assert not (made / "pytorch_model.bin").exists()
    assert seen[-1] == (total, total)
    assert [there for there, _ in seen] == sorted({there for there, _ in seen})
    inodes = {file: file.stat().st_ino for file in made.iterdir()}
    seen.clear()
    assert made == copy(source, tmp_path / "disk", seen=seen)
    assert seen == []
    assert inodes == {file: file.stat().st_ino for file in made.iterdir()}


def test_several_at_once_copy_each_byte_once(source, tmp_path, monkeypatch):
    """Ranks and jobs of a node share the work: all get the whole copy, of which no file is read twice."""
    sent, sendfile = [], os.sendfile
    begin, found = threading.Barrier(FILES), []

    def counted(*arguments):
        sent.append(sendfile(*arguments))
        time.sleep(0.01)  # so that they meet
        return sent[-1]

    def start(turn):
        begin.wait()
        found.append(copy(source, tmp_path / "disk", turn=turn))

    monkeypatch.setattr(os, "sendfile", counted)
    threads = [threading.Thread(target=start, args=(turn,)) for turn in range(FILES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == FILES
    assert {contents(folder) == contents(source) for folder in found} == {True}
    assert sum(sent) == sum(len(data) for data in contents(source).values())


def test_what_another_process_copies_is_waited_for(source, tmp_path):
    """A file whose lock is held is taken once it is there; meanwhile the growth of the copy is reported."""
    folder = copy(source, tmp_path / "disk")
    last = folder / f"model-{FILES - 1}.safetensors"
    whole = last.read_bytes()
    last.rename(last.with_suffix(".hidden"))
    seen: list[tuple[int, int]] = []
    with (folder / f"{last.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / f"{last.name}.partial").write_bytes(whole[:100])
        waiting = threading.Thread(target=copy, args=(source, tmp_path / "disk"), kwargs={"seen": seen})
        waiting.start()
        wait_for(lambda: seen, "word of how much is there")
        assert waiting.is_alive()
        last.with_suffix(".hidden").rename(last)
        (folder / f"{last.name}.partial").unlink()
        waiting.join(120)
    total = sum(len(data) for data in contents(source).values())
    assert not waiting.is_alive()
    assert seen[0] == (total - len(whole) + 100, total)


def test_a_copy_that_stands_still_is_not_waited_for(source, tmp_path, monkeypatch, caplog):
    """Whoever holds the lock and does not go on, the model is then read where it is."""
    monkeypatch.setattr(node_cache, "_PATIENCE", 0.5)
    folder = copy(source, tmp_path / "disk")
    (folder / "config.json").unlink()
    with (folder / "config.json.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert source == copy(source, tmp_path / "disk")
    assert "does not go on: config.json" in caplog.text


def test_a_copy_that_was_cut_off_is_made_again(source, tmp_path):
    """What a killed process has left of a file is not taken for the file."""
    folder = copy(source, tmp_path / "disk")
    (folder / "model-1.safetensors").unlink()
    (folder / "model-1.safetensors.partial").write_bytes(b"half")
    assert folder == copy(source, tmp_path / "disk")
    assert contents(source) == contents(folder)


def test_a_damaged_copy_is_removed_and_not_used(source, tmp_path, caplog):
    """A copy that something has written to is not loaded; the next start makes a new one."""
    folder = copy(source, tmp_path / "disk")
    with (folder / "model-2.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"damaged!")
    assert source == copy(source, tmp_path / "disk")
    assert "the copy on this node was damaged" in caplog.text
    assert not folder.exists()
    assert folder == copy(source, tmp_path / "disk")


def test_another_tokenizer_is_another_model(source, tmp_path):
    """Models of the same weights with other small files do not share a copy."""
    first = copy(source, tmp_path / "disk")
    (source / "tokenizer.json").write_text("{}")
    assert first != copy(source, tmp_path / "disk")


def test_a_worker_that_is_to_end_does_not_go_on_copying(source, tmp_path):
    """It leaves at the next piece, and no part of a file under the file's name."""
    assert source == copy(source, tmp_path / "disk", leave=lambda: True)
    left = [path.name for path in (tmp_path / "disk").glob("*/*/*") if path.suffix != ".lock"]
    assert left == []


def test_what_nobody_used_for_a_week_is_removed(source, tmp_path):
    """Old copies make room at the next start of any model; younger ones stay."""
    base = copy(source, tmp_path / "disk").parent
    for name, age in (("old", WEEK + 60), ("young", WEEK - 60)):
        (base / name).mkdir()
        (base / name / "model.safetensors").write_bytes(b"weights")
        os.utime(base / name, (time.time() - age,) * 2)
    copy(source, tmp_path / "disk")
    assert {path.name for path in base.iterdir() if path.is_dir()} == {"young", copy(source, tmp_path / "disk").name}


def test_to_use_a_copy_keeps_it(source, tmp_path):
    """A copy is as old as its last use."""
    folder = copy(source, tmp_path / "disk")
    os.utime(folder, (time.time() - 2 * WEEK,) * 2)
    assert folder == copy(source, tmp_path / "disk")
    copy(source, tmp_path / "disk")
    assert folder.exists()


@contextmanager
def small_disk(path, **options):
    """A real file system of its own, in memory."""
    path.mkdir()
    given = ",".join(f"{name}={value}" for name, value in options.items())
    subprocess.run(["mount", "-t", "tmpfs", "-o", given, "nnsight-hpc-test", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="to mount a small disk takes root")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": "16k"}, "MiB are free"),  # seen before
        ({"size": "1m", "nr_inodes": 9}, "No space left on device"),  # met on the way
    ],
)
def test_a_full_disk_is_no_failure(source, tmp_path, options, said, caplog):
    """The model is read where it is, the log says why, and nothing is left that takes up the disk."""
    with small_disk(tmp_path / "disk", **options) as disk:
        assert source == copy(source, disk)
        assert said in caplog.text
        assert list(disk.glob("*/*/*.safetensors")) == []


@pytest.mark.parametrize("cache", ["/proc/none", "relative", "$NNSIGHT_HPC_NOT_SET/x"])
def test_a_folder_that_cannot_be_is_no_failure(source, cache, caplog):
    """A node without such a disk reads the model where it is."""
    assert source == copy(source, cache)
    assert "cannot be copied to this node" in caplog.text


def test_a_folder_that_others_may_write_to_is_not_used(source, tmp_path, caplog):
    """Who may write to the copy decides what the worker computes."""
    base = copy(source, tmp_path / "disk").parent
    base.chmod(0o777)
    assert source == copy(source, tmp_path / "disk")
    assert "others may write to it" in caplog.text


def test_variables_are_put_in(source, tmp_path, monkeypatch):
    """Sites name a node's disk by a variable."""
    monkeypatch.setenv("LOCAL_DISK", str(tmp_path / "disk"))
    assert copy(source, "$LOCAL_DISK/models").is_relative_to(tmp_path / "disk" / "models")


def test_a_worker_loads_from_the_copy(bench, tmp_path, tiny_llama):
    """The first worker of a node copies, the second does not; the model keeps its name, and answers."""
    bench.spec = msgspec.structs.replace(bench.spec, node_cache=str(tmp_path / "disk"))
    bench.ready_worker("w1")
    bench.ready_worker("w2")
    assert "was copied to this node" in bench.log("w1")
    assert "is already on this node" in bench.log("w2")
    model = bench.daemon.reports[-1].model
    assert (model.id, model.revision) == (str(tiny_llama), None)
    request = bench.daemon.submit(capture_frame())
    assert bench.daemon.outcome(request).error is None
    assert "hidden" in unpack_values(bench.daemon.result(request))


def test_it_is_the_copy_that_is_read(tmp_path, tiny_llama, monkeypatch):
    """What is loaded lies on the node's disk, and is known by the name that the pool gives it."""
    read, load = [], models.load

    def watched(folder, **options):
        read.append(Path(folder))
        return load(folder, **options)

    monkeypatch.setattr(models, "load", watched)
    spec = PoolSpec(name="tiny", model=str(tiny_llama), node_cache=str(tmp_path / "disk"))
    model = _load_alone(spec, Control("w1"))
    assert [folder.is_relative_to(tmp_path / "disk") for folder in read] == [True]
    assert model.loaded.identity.id == str(tiny_llama)
