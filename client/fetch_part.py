"""Copying a part of a dataset: only the bytes of the rows that are asked for travel, and what describes the dataset.

The copy grows in ``NAME.zarr.<8 hex digits>.partial/NAME.zarr``; the digits are those of what was asked for, so that the
same command goes on with it, and another one does not.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from nnsight_hpc.client.fetch import check_room, counted, goal_of, publish, streams_for, working_folder
from nnsight_hpc.client.progress import Progress
from nnsight_hpc.client.remote_dataset import Described, StreamFiles
from nnsight_hpc.client.streams import spread
from nnsight_hpc.storage import ActivationDataset
from nnsight_hpc.storage.files import CachedFiles
from nnsight_hpc.storage.part import bytes_of, choose, copy_part, part_of
from nnsight_hpc.storage.sources import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from nnsight_hpc.client.patience import PatientClient
    from nnsight_hpc.storage.part import Part, Piece


@dataclass(frozen=True)
class Wanted:
    """Which part: names of captures (all when there are none), and rows by tokens or by documents, or all."""

    captures: Sequence[str] = ()
    tokens: slice | None = None
    documents: slice | None = None

    @property
    def everything(self) -> bool:
        return not self.captures and self.tokens is None and self.documents is None


def fetch_part(clients: Sequence[PatientClient], name: str, folder: Path, wanted: Wanted) -> Path:
    """Copy a part of the dataset `name` to `folder`, as a dataset of its own; the path of the copy.

    Raises what `fetch.fetch` does, and what `storage.part.choose` has against `wanted`.
    """
    goal = goal_of(clients[0], name, folder)
    described = Described(clients[0], name)
    streams = [StreamFiles(client, "", name) for client in clients]
    source = Source(name, described.root, CachedFiles(streams[0], described.sizes), described.close)
    try:
        part = choose(ActivationDataset(source), wanted.captures, tokens=wanted.tokens, documents=wanted.documents)
        with working_folder(goal, goal.with_name(f"{goal.name}.{_digest(source, part)}.partial")) as partial:
            _copy(source, streams, part, partial / goal.name)
            publish(partial / goal.name, goal)
            partial.rmdir()
    finally:
        source.close()
    return goal


def _copy(source: Source, streams: Sequence[StreamFiles], part: Part, target: Path) -> None:
    total = bytes_of(part)
    check_room(target, total - sum(file.stat().st_size for file in target.rglob("*") if file.is_file()))
    datasets = [ActivationDataset(dataclasses.replace(source, files=files)) for files in streams[: streams_for(total)]]
    with Progress(f"fetch {source.name}") as progress, counted(total, progress) as tally:

        def bring(pieces: Iterable[Piece], write: Callable[[Piece, npt.NDArray[Any]], None]) -> None:
            def read(dataset: ActivationDataset, piece: Piece) -> None:
                block = dataset[piece.capture][piece.source : piece.source + piece.rows]
                tally.came(block.nbytes)
                write(piece, block)

            spread(datasets, pieces, read)

        copy_part(source, part, target, bring, tally.found)


def _digest(source: Source, part: Part) -> str:
    asked = msgspec.json.encode([part_of(source, part), [capture.name for capture in part.captures]])
    return hashlib.sha256(asked).hexdigest()[:8]
