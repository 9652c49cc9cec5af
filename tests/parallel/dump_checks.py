"""Dumps on several ranks, each of which writes some of the files: against the same ranks when one of them writes all."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from unittest import mock

import pytest

from nnsight_hpc.graph.build import FORWARD, READS, SAVE, GraphBuilder, Ref
from nnsight_hpc.graph.nodes import TensorRef
from nnsight_hpc.models import module_tree
from nnsight_hpc.parallel.loading import load_parallel
from nnsight_hpc.parallel.view import ShardedView
from nnsight_hpc.slurm.worker import dump as dump_module
from nnsight_hpc.slurm.worker.dumps import Dumps
from nnsight_hpc.slurm.worker.model import Member, Program
from nnsight_hpc.slurm.worker.ranks import Ranks
from nnsight_hpc.slurm.worker.scribe import OwnScribe
from nnsight_hpc.slurm.worker.warmup import first_forward
from nnsight_hpc.storage import DatasetWriter, read_attributes, read_manifest
from nnsight_hpc.storage.writer import this_process
from nnsight_hpc.wire.errors import HpcError, RequestCancelled
from nnsight_hpc.wire.messages import DumpPlan, ModelIdentity, decode
from tests.models_for_tests import save_tiny_llama
from tests.parallel.loading_checks import from_rank_0
from tests.slurm.worker.graphs import capture_frame, dump_frame
from tests.slurm.worker.shared_slices import Board
from tests.slurm.worker.test_dump import go_on, texts
from tests.storage.contents import contents

FORMATS = ("zarr", "hdf5")
DOCUMENTS = texts(40, (40, 80))


class SmallShards(DatasetWriter):
    """Of captures of tokens 1,024 rows, of which two are a slice."""

    @classmethod
    def create(cls, path, **options):
        return super().create(path, **(options | {"rows_per_slice": 2048, "shard_bytes": 1}))


class OneWriter:
    """The ranks as a model of which rank 0 gets all values, and writes them alone."""

    def __init__(self, ranks):
        self._ranks, self.scribe = ranks, OwnScribe()

    def __getattr__(self, name):
        return getattr(self._ranks, name)

    def write(self, member):
        self.scribe.put(self._ranks.run(member))


@cache
def model_of(world, guard, folder: str) -> Ranks:
    """A Llama, split over 2 ranks, and held whole by each of 3, which do not divide its heads."""
    loaded = load_parallel(folder, world, guard, replicated=world.size == 3)
    view = guard.run(lambda: ShardedView(world, loaded.module, module_tree(folder)))
    guard.run(partial(first_forward, loaded))
    return Ranks(world, guard, loaded, view)


def led(rank, lead):
    """Have rank 0 do something with the model and an empty folder, while the others follow."""
    where = Path(tempfile.gettempdir()) / "models" / "dumped"
    from_rank_0(rank, lambda: where.exists() or save_tiny_llama(where))
    model = model_of(rank.world, rank.guard, str(where))
    with tempfile.TemporaryDirectory() as folder, model:
        lead(model, Path(folder)) if rank.world.rank == 0 else model.follow()


def frame(*, scale: float | None = None, **options) -> bytes:
    """A dump of what is whole on each rank, of what is split, and of a row for each document."""
    builder = GraphBuilder()
    inputs = {name: TensorRef(name) for name in ("input_ids", "attention_mask", "position_ids")}
    forward = Ref(builder.append(FORWARD, (), {**inputs, "use_cache": False}, None))
    values = {
        "inner": builder.add(READS["input"], forward, "model.layers.0.mlp.down_proj"),
        **{f"hidden.{n}": builder.add(READS["output"], forward, f"model.layers.{n}") for n in range(3)},
    }
    if scale is not None:
        values = {name: builder.add("Tensor.mul", Ref(value), scale) for name, value in values.items()}
    values["mean"] = builder.add("Tensor.mean", Ref(values["hidden.2"]), 1)
    graph = builder.build({name: builder.add(SAVE, Ref(value)) for name, value in values.items()}, ModelIdentity("x"))
    return dump_frame(DOCUMENTS, (), graph=graph.to_json(), **{"batch_tokens": 256, **options})


def dumps_on(model) -> Dumps:
    return Dumps(model, Board().slices("w"))


@cache
def written_by_one(model):
    """What the dataset of `frame()` is to be."""
    with tempfile.TemporaryDirectory() as folder:
        go_on(dumps_on(OneWriter(model)), 1, frame(), Path(folder))
        return contents(Path(folder) / "set.zarr")


def assert_serves(model):
    """The next request is served."""
    assert [*model.run(Member(Program.read(capture_frame())))] == ["hidden"]


def partials(folder) -> list[Path]:
    return [*folder.rglob("*.partial")]


def check_the_files_are_those_of_one_writer(rank):
    """Byte for byte in both formats, and each rank has written some: of one capture, shard files of one slice."""
    ranks = rank.world.comm.allgather(this_process())

    def lead(model, folder):
        for form in FORMATS:
            asked = frame(format=form, name=form)
            with mock.patch.object(dump_module, "DatasetWriter", SmallShards):
                go_on(dumps_on(OneWriter(model)), 1, asked, folder / "one")
                go_on(dumps_on(model), 1, asked, folder / "all")
            one, together = (folder / place / f"{form}.{form}" for place in ("one", "all"))
            assert contents(one) == contents(together)
            entries = [entry for entry in read_manifest(together) if entry.slice == 0]
            assert {ranks[0]} == {entry.writer for entry in read_manifest(one)}
            assert {*ranks} == {entry.writer for entry in entries}
            writers = {(Path(entry.path).parent, entry.writer) for entry in entries}
            assert len({capture for capture, _ in writers}) < len(writers)

    led(rank, lead)


def check_what_does_not_fit_the_dtype_is_counted_once(rank):
    """The counts of the ranks add up to those of one writer."""

    def lead(model, folder):
        asked = frame(dtype="float16", scale=1e5)
        with mock.patch.object(dump_module, "DatasetWriter", SmallShards):
            one = go_on(dumps_on(OneWriter(model)), 1, asked, folder / "one")
            together = go_on(dumps_on(model), 1, asked, folder / "all")
        assert one["overflows"] == together["overflows"]
        assert len(one["overflows"]) > 3

    led(rank, lead)


def check_a_full_disk_is_one_error(rank):
    """On a full disk the dump fails in the words of one process, leaves no files, and goes on later."""

    def lead(model, folder):
        expected, small = written_by_one(model), folder / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", small], check=True)
        try:
            with pytest.raises(HpcError, match="the disk is full, or a quota") as raised:
                go_on(dumps_on(model), 1, frame(), small)
            assert raised.value.next == "free space, then resume: the slices that are finished are kept"
            assert partials(small) == []
            assert_serves(model)
            subprocess.run(["mount", "-o", "remount,size=16m", small], check=True)
            go_on(dumps_on(model), 2, frame(), small)
            assert expected == contents(small / "set.zarr")
        finally:
            subprocess.run(["umount", small], check=True)

    led(rank, lead)


def check_the_disk_of_a_follower(rank):
    """A rank that cannot write alone has all fail, by its words and its name; its error is that of the request."""
    last = rank.world.size - 1
    full = mock.patch.object(os, "pwrite", side_effect=OSError(errno.ENOSPC, "No space left on device"))

    def lead(model, folder):
        with pytest.raises(HpcError, match="the disk is full, or a quota") as raised:
            go_on(dumps_on(model), 1, frame(), folder / "all")
        assert f"raised by rank {last} on" in raised.value.why
        assert partials(folder) == []
        assert not read_attributes(folder / "all" / "set.zarr").complete
        assert_serves(model)

    with full if rank.world.rank == last else nullcontext():
        led(rank, lead)


def check_a_dump_that_gives_way_goes_on(rank):
    """After each batch another request is served, and the files are those of a dump that was left in peace."""

    def lead(model, folder):
        expected, dumps = written_by_one(model), dumps_on(model)
        attempt = 1
        while go_on(dumps, attempt, frame(), folder / "all", gives_way=lambda: True) is None:
            assert_serves(model)
            attempt += 1
        assert attempt > 5
        assert expected == contents(folder / "all" / "set.zarr")

    led(rank, lead)


def check_a_dump_that_does_not_come_back(rank):
    """What has paused is given up when another dump comes, and when the worker ends: nothing of its slice is left."""

    def lead(model, folder):
        expected, dumps = written_by_one(model), dumps_on(model)
        assert go_on(dumps, 1, frame(), folder / "first", gives_way=lambda: True) is None
        assert partials(folder / "first")
        dumps.close()
        assert partials(folder / "first") == []
        go_on(dumps_on(model), 1, frame(), folder / "first")
        assert expected == contents(folder / "first" / "set.zarr")

    led(rank, lead)


def check_a_slice_that_another_writer_has_begun(rank):
    """Ranks that were taken for dead do not commit what they have begun: the slice is written anew, and no file is left."""

    def lead(model, folder):
        expected, dumps = written_by_one(model), dumps_on(model)
        path = folder / "all" / "set.zarr"
        assert go_on(dumps, 1, frame(), folder / "all", gives_way=lambda: True) is None
        DatasetWriter(path).plan(0).begin()
        go_on(dumps, 2, frame(), folder / "all")
        assert expected == contents(path)
        assert partials(path) == []

    led(rank, lead)


def check_a_dump_can_be_cancelled(rank):
    """In the middle of a slice; it goes on later to the same files."""

    def lead(model, folder):
        expected, asked = written_by_one(model), iter(range(100))
        with pytest.raises(RequestCancelled):
            go_on(dumps_on(model), 1, frame(), folder / "all", cancelled=lambda: next(asked, None) is None)
        assert next(asked, None) is None
        assert partials(folder) == []
        go_on(dumps_on(model), 2, frame(), folder / "all")
        assert expected == contents(folder / "all" / "set.zarr")

    led(rank, lead)


def check_a_plan_writes_nothing(rank):
    """It is measured on all ranks, and says what a dump would have."""

    def lead(model, folder):
        plan = decode(go_on(dumps_on(model), 1, frame(measure=True), folder)["plan"].encode(), DumpPlan)
        assert len(DOCUMENTS) == plan.documents
        assert sorted(one.name for one in plan.captures) == ["hidden.0", "hidden.1", "hidden.2", "inner", "mean"]
        assert [*folder.iterdir()] == []

    led(rank, lead)
