"""The stages of the demonstration: seconds of each, and its share of the whole.

The model is prepared before, as in a second run. ``--quick`` runs a smaller corpus.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from figures import Figure, main

from nnsight_hpc.client.demo import DOCUMENTS, run_demo
from nnsight_hpc.models.smollm2 import default_folder, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

SECOND_RUN_SECONDS = 150
QUICK_DOCUMENTS = 40


def measure(quick: bool) -> Iterator[Figure]:
    prepare(default_folder())
    with tempfile.TemporaryDirectory() as folder:
        run_demo(Path(folder) / "demo", documents=QUICK_DOCUMENTS if quick else DOCUMENTS)
        seconds: dict[str, float] = json.loads((Path(folder) / "demo" / "demo.json").read_text())["seconds"]
    total = sum(seconds.values())
    yield Figure("whole demonstration [s]", total, SECOND_RUN_SECONDS, "<=", "a second run on 2 cores")
    for stage, value in seconds.items():
        yield Figure(f"{stage} [s]", value, None, "<=", "")
        yield Figure(f"{stage} [share]", value / total, None, "<=", "the whole demonstration")


if __name__ == "__main__":
    main(measure, __doc__ or "")
