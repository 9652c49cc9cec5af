"""How well rows are mixed: beside a perfect shuffle, and beside what the size of the buffer allows."""

import numpy as np
import pytest

from nnsight_hpc.storage.mixing import mixed
from nnsight_hpc.storage.selection import Selection

ROWS, BATCH, BUFFER = 102_400, 512, 8192


@pytest.fixture(scope="module")
def epoch():
    """The row numbers of one epoch in the order in which they come, batch by batch."""
    selection = Selection.of(ROWS, [(0, ROWS)], {})
    blocks = np.random.default_rng(1).permutation(ROWS // 256)
    arrays = {"row": np.arange(ROWS)}
    batches = mixed(arrays, selection, blocks, batch_size=BATCH, buffer_rows=BUFFER, random=np.random.default_rng(2))
    return np.stack([batch["row"] for batch in batches])


def test_neighbours_share_a_batch_as_rarely_as_the_buffer_allows(epoch):
    """A batch takes the share f of the buffer, so two rows that came together leave together with f / (2 - f): 3.2 %."""
    batch_of = np.empty(ROWS, dtype=int)
    batch_of[epoch] = np.arange(len(epoch))[:, None]
    inside = np.arange(ROWS - 1) % 256 != 255  # both in one block
    together = np.mean((batch_of[:-1] == batch_of[1:])[inside])
    share = BATCH / BUFFER
    assert together == pytest.approx(share / (2 - share), rel=0.15)


def test_a_batch_draws_from_as_many_blocks_as_are_there(epoch):
    """512 rows come from 70 blocks or more; without a buffer they would come from two, perfectly mixed from 289."""
    blocks = [len(np.unique(batch // 256)) for batch in epoch[20:-20]]
    assert min(blocks) >= 70


def test_the_order_says_nothing_about_the_row(epoch):
    """Neither an early nor a late part of the data comes first, and a place in a batch means nothing."""
    order = epoch.reshape(-1)
    assert abs(np.corrcoef(np.arange(ROWS), order)[0, 1]) < 0.15  # 400 blocks: standard deviation 0.05
    assert abs(np.corrcoef(np.arange(ROWS) % BATCH, order % 256)[0, 1]) < 0.015  # standard deviation 0.003
    assert len(np.unique(order)) == ROWS


def test_rows_leave_after_as_long_as_a_memoryless_draw_keeps_them(epoch):
    """The rows of a block are spread over the epoch by the buffer: their batches differ by buffer / batch on average."""
    batch_of = np.empty(ROWS, dtype=int)
    batch_of[epoch] = np.arange(len(epoch))[:, None]
    spread = batch_of.reshape(-1, 256).std(axis=1)
    share = BATCH / BUFFER
    assert np.median(spread) == pytest.approx(np.sqrt(1 - share) / share, rel=0.2)
