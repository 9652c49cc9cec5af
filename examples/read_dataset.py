"""Read an activation dataset: shuffled batches in a DataLoader, and a first statistic over all of it.

python -m nnsight_hpc.examples.read_dataset run1.zarr
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from nnsight_hpc.storage import ActivationDataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="the folder NAME.zarr")
    parser.add_argument("--batch-size", type=int, default=512, help="tokens in a batch")
    options = parser.parse_args()
    dataset = ActivationDataset(options.dataset)
    began = time.perf_counter()
    batches, norms = 0, {capture: torch.zeros(2, dtype=torch.float64) for capture in dataset.captures}
    for batch in DataLoader(dataset.to_torch(batch_size=options.batch_size, shuffle=True, seed=0), batch_size=None):
        for capture in norms:
            rows = batch[capture].double().norm(dim=-1)
            norms[capture] += torch.tensor([rows.sum(), len(rows)])
        batches += 1
    seconds = time.perf_counter() - began
    table = Table("capture", "tokens", "mean norm", title=f"{batches} shuffled batches in {seconds:.1f} s")
    for capture, (total, count) in norms.items():
        table.add_row(capture, f"{int(count):,}", f"{float(total / count):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
