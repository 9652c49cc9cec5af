"""Graphs of dumps: one forward, whose input is whatever batch of the corpus the graph is run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.graph.build import FORWARDS, GENERATE
from nnsight_hpc.graph.nodes import TensorRef
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from nnsight_hpc.graph.nodes import Graph

BATCH = ("input_ids", "attention_mask", "position_ids")
"""The tensors that stand for the batch, each ``[documents, tokens]``: constants that come with no graph."""


def check_dump_graph(graph: Graph, tensors: Collection[str]) -> None:
    """Raise `InvalidGraph` unless a validated graph can be run on batch after batch of a corpus.

    Parameters
    ----------
    tensors
        The names of the tensor constants that come with it.
    """
    if problems := list(_problems(graph, tensors)):
        raise InvalidGraph("this graph cannot be run over a corpus", why="\n".join(problems))


def _problems(graph: Graph, tensors: Collection[str]) -> Iterator[str]:
    forwards = [node for node in graph.nodes if node.op in FORWARDS]
    if len(forwards) != 1 or forwards[0].op == GENERATE:
        yield "it has to have one forward, and no generation"
    elif forwards[0].kwargs.get("input_ids") != TensorRef("input_ids"):
        yield "its forward has to take the tensor 'input_ids', which stands for the batch"
    if not graph.saves:
        yield "it keeps nothing"
    for name, save in graph.saves.items():
        if graph.nodes[save].block is not None:
            yield f"{name} is kept in a conditional or loop on values, and every batch has to have it"
    if own := sorted(set(tensors).intersection(BATCH)):
        yield f"it brings {', '.join(own)}, which stand for the batch"
    if missing := sorted(graph.tensor_names().difference(tensors, BATCH)):
        yield f"it refers to tensors that were not sent with it: {', '.join(missing)}"
