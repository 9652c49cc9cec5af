import gc
import signal
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from nnsight_hpc.wire.errors import InvalidInput, NotFound

ROWS = 5000


@pytest.fixture
def ds(tmp_path, write_dataset, random_rows):
    """`row` holds each row's own number, `x` follows from it."""
    numbers = np.arange(ROWS, dtype=np.int64)
    data = {"row": ("int64", numbers), "x": ("bfloat16", random_rows("bfloat16", (ROWS, 4)))}
    return write_dataset(tmp_path / "n.zarr", data, rows_per_slice=2048)


def _rows(batches):
    return torch.cat([batch["row"] for batch in batches]).numpy()


def _load(dataset, workers, **options):
    return list(DataLoader(dataset, batch_size=None, num_workers=workers, **options))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_comes_exactly_once(ds, workers, shuffle):
    """Neither duplicates nor losses, with and without worker processes, and every column belongs to its row."""
    batches = _load(ds.to_torch(batch_size=300, shuffle=shuffle, buffer_rows=1500), workers)
    rows = _rows(batches)
    np.testing.assert_array_equal(np.sort(rows), np.arange(ROWS))
    assert all(len(batch["row"]) <= 300 for batch in batches)
    bits = torch.cat([batch["x"].view(torch.int16) for batch in batches])
    assert torch.equal(bits, ds["x"].to_torch(rows).view(torch.int16))
    for name in ("document", "position"):
        column = torch.cat([batch[name] for batch in batches])
        np.testing.assert_array_equal(column, getattr(ds.tokens, name)[rows])


def test_every_worker_process_takes_part(ds):
    """Two workers give batches of different blocks, not the same ones twice."""
    single, double = (len(_load(ds.to_torch(batch_size=300, buffer_rows=600), n)) for n in (0, 2))
    assert (single, double) == (17, 18)  # the last batch of each worker is smaller


def test_batches_hold_the_captures_that_were_asked_for(ds):
    """The dict's keys and the tensors' dtypes are fixed."""
    batch = next(iter(ds.to_torch(["x"], batch_size=7)))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "x": (torch.bfloat16, (7, 4)),
        "document": (torch.int32, (7,)),
        "position": (torch.int32, (7,)),
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_without_shuffling_the_order_is_that_of_the_rows(ds, workers):
    """Batches come in order, also from several workers."""
    rows = _rows(_load(ds.to_torch(batch_size=300, shuffle=False), workers))
    np.testing.assert_array_equal(rows, np.arange(ROWS))


def test_the_order_follows_from_seed_and_epoch(ds):
    """The same seed and epoch repeat the order, another one changes it."""

    def order(seed, epoch, workers=0):
        dataset = ds.to_torch(batch_size=300, seed=seed)
        dataset.set_epoch(epoch)
        return _rows(_load(dataset, workers)).tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1), order(0, 1, workers=2)]
    assert order(0, 1) == orders[1]
    assert order(0, 1, workers=2) == orders[4]
    assert len({tuple(rows) for rows in orders}) == len(orders)


def test_workers_that_persist_see_the_new_epoch(ds):
    """`set_epoch` reaches worker processes that live through several epochs."""
    dataset = ds.to_torch(batch_size=300, seed=0)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    first = _rows(loader)
    dataset.set_epoch(1)
    second = _rows(loader)
    assert first.tolist() != second.tolist()
    np.testing.assert_array_equal(np.sort(second), np.arange(ROWS))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.fixed_dictionaries(
        {"batch_size": st.integers(30, 900), "buffer_rows": st.integers(1, 4000), "shuffle": st.booleans()}
    ),
    workers=st.integers(1, 5),
    world=st.integers(1, 4),
    period=st.integers(1, 300),
)
def test_ranks_and_workers_share_out_the_rows(ds, sizes, workers, world, period):
    """Whatever their number, and whatever rows are left out: every row that is asked for comes once, to one of them."""
    options = {**sizes, "world": world, "where": lambda tokens: tokens.position % period == 0}
    expected = np.flatnonzero(ds.tokens.position[:] % period == 0)
    ranks = [ds.to_torch(["row"], rank=rank, **options) for rank in range(world)]
    assert [len(expected)] * world == [dataset.rows for dataset in ranks]
    batches = [batch for dataset in ranks for worker in range(workers) for batch in dataset._batches(worker, workers)]
    rows = np.concatenate([batch["row"] for batch in batches])
    np.testing.assert_array_equal(expected, np.sort(rows))
    full = [ds.to_torch(["row"], rank=rank, drop_last=True, **options) for rank in range(world)]
    lengths = [[len(batch["row"]) for w in range(workers) for batch in d._batches(w, workers)] for d in full]
    assert [lengths[0]] * world == lengths
    assert {sizes["batch_size"]} >= set(lengths[0])
    assert sum(map(sum, lengths)) > len(expected) - world * workers * (sizes["batch_size"] + 256)


def test_in_order_batches_are_full_and_in_order_with_a_condition(ds):
    """What is left out leaves no short batches, and two workers give the same batches as none."""
    dataset = ds.to_torch(["row"], batch_size=300, shuffle=False, where=lambda tokens: tokens.position > 0)
    expected = np.flatnonzero(ds.tokens.position[:] > 0)
    for workers in (0, 2):
        batches = _load(dataset, workers)
        np.testing.assert_array_equal(expected, _rows(batches))
        assert {300} == {len(batch["row"]) for batch in batches[:-1]}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_persistent_workers_lose_and_repeat_nothing(ds):
    """Three workers share twenty blocks, epoch after epoch, without a row too many or too few."""
    loader = DataLoader(ds.to_torch(["row"], batch_size=300), batch_size=None, num_workers=3, persistent_workers=True)
    for _ in range(3):
        np.testing.assert_array_equal(np.arange(ROWS), np.sort(_rows(loader)))


def test_the_buffer_and_two_batches_are_all_that_is_held(tmp_path, write_dataset, random_rows):
    """Of 20 MiB no more is in memory at any time than the buffer, a block, and the batches that are being made and used."""
    rows, row_bytes = 20_480, 1024
    ds = write_dataset(tmp_path / "n.zarr", {"x": ("uint8", random_rows("uint8", (rows, row_bytes)))})
    dataset = ds.to_torch(batch_size=256, buffer_rows=2048)
    tracemalloc.start()
    try:
        assert rows == sum(len(batch["x"]) for batch in dataset)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 2048 * row_bytes < peak < (2048 + 4 * 256) * row_bytes + 500_000


@pytest.mark.parametrize(("batch_size", "buffer_rows"), [(1, 1), (ROWS, 1), (3 * ROWS, 10), (257, 10**9)])
def test_any_sizes_of_batch_and_buffer_lose_no_row(ds, batch_size, buffer_rows):
    """A buffer that is too small is enlarged, one that is too large is not filled with anything else."""
    rows = _rows(ds.to_torch(batch_size=batch_size, buffer_rows=buffer_rows))
    np.testing.assert_array_equal(np.sort(rows), np.arange(ROWS))


def test_batches_do_not_share_memory(ds):
    """A batch that is kept is not overwritten by later ones."""
    batches = iter(ds.to_torch(["row"], batch_size=100))
    first = next(batches)["row"]
    before = first.clone()
    for _ in batches:
        pass
    assert torch.equal(first, before)


def test_an_empty_dataset_has_no_batches(tmp_path, write_dataset, random_rows):
    """No rows, no batch, also with workers."""
    ds = write_dataset(tmp_path / "empty.zarr", {"x": ("float32", random_rows("float32", (0, 4)))})
    assert [_load(ds.to_torch(shuffle=shuffle), workers) for shuffle in (True, False) for workers in (0, 2)] == [[]] * 4


def test_wrong_options_are_refused_before_anything_is_read(ds):
    """Sizes below one and unknown captures raise at once."""
    for wrong in (
        {"batch_size": 0},
        {"buffer_rows": 0},
        {"seed": -1},
        {"world": 0},
        {"rank": 2, "world": 2},
        {"rank": -1},
    ):
        with pytest.raises(InvalidInput, match="must be at least"):
            ds.to_torch(**wrong)
    with pytest.raises(NotFound):
        ds.to_torch(["nothing"])


def _interrupted(dataset):
    for _ in dataset:
        signal.raise_signal(signal.SIGINT)


def _forgotten(dataset):
    batches = iter(dataset)
    next(batches)


@pytest.mark.parametrize("shuffle", [True, False])
def test_nothing_is_left_by_an_iterator_that_is_interrupted_or_dropped(ds, shuffle):
    """Neither threads nor open files, after Ctrl-C and after a first batch; also in a DataLoader."""
    dataset = ds.to_torch(batch_size=300, shuffle=shuffle)
    for batches in (dataset, DataLoader(dataset, batch_size=None)):
        with pytest.raises(KeyboardInterrupt):
            _interrupted(batches)
        _forgotten(batches)
    gc.collect()
    files = [file.resolve() for file in Path("/proc/self/fd").iterdir()]
    assert not [file for file in files if file.is_relative_to(ds.path)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dataset-reader")]


def test_worker_processes_start_while_the_parent_reads_ahead(ds):
    """A process that forks in the middle of an epoch of its own goes on, and so do its workers."""
    mine = iter(ds.to_torch(["row"], batch_size=300))
    first = [next(mine)]
    np.testing.assert_array_equal(np.arange(ROWS), np.sort(_rows(_load(ds.to_torch(["row"], batch_size=300), 2))))
    np.testing.assert_array_equal(np.arange(ROWS), np.sort(_rows([*first, *mine])))


def test_reading_leaves_no_open_files(ds):
    """Shard files are open only while they are read."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    _rows(ds.to_torch(batch_size=300))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1  # the epoch's shared memory
