"""A dump in the process that asked for it, by the same code as in a worker; tracing finds it by its entry point."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import Progress

from nnsight_hpc.execution import run_graph
from nnsight_hpc.slurm.worker.allowance import Allowance
from nnsight_hpc.slurm.worker.dump import dump
from nnsight_hpc.slurm.worker.dump_job import Job
from nnsight_hpc.slurm.worker.measure import measure
from nnsight_hpc.slurm.worker.scribe import Hands, OwnScribe
from nnsight_hpc.slurm.worker.slices import OwnSlices
from nnsight_hpc.storage import ActivationDataset, dataset_folder
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.frames import pack
from nnsight_hpc.wire.messages import encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.models import Loaded
    from nnsight_hpc.wire.messages import DumpProgress, DumpSpec


class DumpedHere:
    """A dump that has run in this process."""

    id = ""

    def __init__(self, summary: dict[str, Any], path: Path) -> None:
        self._summary, self.path = summary, path

    def status(self) -> NoReturn:
        raise InvalidInput("a dump in this process is no request", next="d.summary() says what was written")

    def wait(self, timeout: float | None = None) -> None:
        """Nothing is left to wait for."""

    def result(self, timeout: float | None = None) -> dict[str, Any]:  # noqa: ARG002 - it is there already
        """What was written."""
        return self._summary

    def dataset(self) -> ActivationDataset:
        return ActivationDataset(self.path)


def dump_here(spec: DumpSpec, block: bytes, loaded: Loaded) -> DumpedHere:
    """Write the dataset into the working folder, or go on writing it; `block` is as in a request. Raises as `dump`."""

    def run(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return run_graph(graph, tensors, loaded.module)

    job, folder = Job.read(pack(encode(spec), block), loaded), Path.cwd()
    path = dataset_folder(folder, spec.name, spec.format)
    if spec.measure:
        return DumpedHere({"plan": encode(measure(job, loaded, run, folder, _never)).decode()}, path)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"dump {spec.name}", total=None)

        def show(progress: DumpProgress) -> None:
            bar.update(task, completed=progress.tokens, total=progress.tokens_total)

        scribe = OwnScribe()
        hands = Hands(run, lambda graph, tensors: scribe.put(run(graph, tensors)), scribe)
        steps = dump(job, loaded, hands, folder, Allowance(None), cancelled=_never, slices=OwnSlices(show))
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return DumpedHere(end.value, path)


def _never() -> bool:
    """Nobody cancels; Ctrl-C ends it, and the same block written again goes on."""
    return False
