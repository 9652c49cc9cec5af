"""What a dump is to do, once its request is read: the graph, its tensors, the corpus, and where the dataset comes from."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from nnsight_hpc.execution.values import load_tensors, save_tensors
from nnsight_hpc.graph import Graph, capture_graph, expand_points
from nnsight_hpc.graph.dumps import check_dump_graph
from nnsight_hpc.slurm.worker.corpus import read_documents, tokenizer_hash
from nnsight_hpc.storage import Provenance, read_attributes
from nnsight_hpc.storage.corpus import corpus_hash
from nnsight_hpc.wire.errors import Conflict
from nnsight_hpc.wire.frames import unpack
from nnsight_hpc.wire.messages import DumpSpec, decode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from nnsight_hpc.models import Loaded
    from nnsight_hpc.storage import CaptureSpec, TokenTable
    from nnsight_hpc.storage.corpus import Document

_PACKAGES = ("nnsight-hpc", "torch", "transformers", "numpy", "zarr")
_SAME = ("model", "fingerprint", "tokenizer_hash", "corpus_fingerprint", "tensors", "inputs")
_FORM = ("context", "stride", "packed", "batch_tokens")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A dump on a model.

    Attributes
    ----------
    tensors
        The graph's constants, without those that stand for the batch.
    corpus
        A hash of the documents.
    """

    spec: DumpSpec
    graph: Graph
    tensors: Mapping[str, torch.Tensor]
    documents: Sequence[Document]
    corpus: str

    @classmethod
    def read(cls, frame: bytes | memoryview, loaded: Loaded) -> Job:
        """A request: `DumpSpec` as header, in the block the graph's tensors and then the corpus.

        Raises `InvalidInput` and `InvalidGraph` for what is none, and `NotFound` where the model has no such module.
        """
        header, block = unpack(frame)
        spec = decode(header, DumpSpec, what="dump request")
        tensors = load_tensors(block[: spec.tensor_bytes]) if spec.tensor_bytes else {}
        lines = block[spec.tensor_bytes :]
        graph = _graph(spec, loaded)
        check_dump_graph(graph, tensors)
        return cls(spec, graph, tensors, read_documents(lines), spec.corpus_fingerprint or corpus_hash(lines))

    def provenance(self, loaded: Loaded) -> Provenance:
        """Where the dataset comes from."""
        return Provenance(
            model=loaded.identity.id,
            revision=loaded.identity.revision or "",
            fingerprint=loaded.identity.fingerprint,
            tokenizer_hash=tokenizer_hash(loaded.tokenizer),
            graph=self.graph.to_json(),
            corpus_fingerprint=self.corpus,
            software={name: version(name) for name in _PACKAGES},
            command=self.spec.command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tensors=tensors_hash(self.tensors),
            inputs={name: int(getattr(self.spec, name)) for name in _FORM},
        )

    def check_same(
        self, path: Path, captures: Sequence[CaptureSpec], tokens: TokenTable, provenance: Provenance
    ) -> None:
        """Raise `Conflict` unless the dataset at `path` is one that an earlier attempt at this very dump has begun."""
        there = read_attributes(path)
        differing = [name for name in _SAME if getattr(there.provenance, name) != getattr(provenance, name)]
        differing += ["graph"] * (_program(there.provenance) != _program(provenance))
        differing += ["captures"] * (there.captures != tuple(captures))
        differing += ["tokens"] * (there.rows != len(tokens.input_ids))
        if differing:
            raise Conflict(
                f"dataset {path.stem} exists, and is another one",
                where=str(path),
                why=f"they differ in {', '.join(differing)}",
                next=f"choose another name, or `nnsight-hpc rm {path.stem}` first",
            )
        logger.info("going on with %s", path)


def tensors_hash(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of a graph's constants; empty where it has none."""
    return f"sha256:{hashlib.sha256(save_tensors(tensors)).hexdigest()}" if tensors else ""


def _graph(spec: DumpSpec, loaded: Loaded) -> Graph:
    if spec.graph:
        return Graph.from_json(spec.graph)
    points = expand_points(spec.captures, [name for name, _ in loaded.module.named_modules()])
    return capture_graph(points, loaded.identity)


def _program(provenance: Provenance) -> Graph:
    """What the graph computes, wherever it was written."""
    return Graph.from_json(provenance.graph).without_lines()
