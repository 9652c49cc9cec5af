"""Random documents: the validator takes them or refuses them, and nothing else happens."""

import json

import pytest
from hypothesis import given

from nnsight_hpc.graph import Graph, validate
from nnsight_hpc.wire.errors import InvalidGraph
from tests.graph.random_graphs import VALID, graphs, json_values, mutated_documents


def _read(document):
    """The graph of a document, or why it is refused."""
    try:
        graph = Graph.from_json(document)
        validate(graph)
    except InvalidGraph as refusal:
        return refusal
    return graph


@pytest.mark.parametrize("graph", VALID.values(), ids=VALID.keys())
def test_what_is_mutated_is_valid(graph):
    """The documents that mutations start from are taken, and are the same after JSON."""
    assert _read(graph.to_json()) == graph


@given(mutated_documents())
def test_mutated_document_is_taken_or_refused(document):
    """A valid document with random changes is refused as InvalidGraph with words, or is a graph that survives JSON."""
    outcome = _read(document)
    if isinstance(outcome, Graph):
        assert _read(outcome.to_json()).to_json() == outcome.to_json()
    else:
        assert str(outcome)


@given(graphs())
def test_random_nodes_are_taken_or_refused(graph):
    """Random nodes over all operations are taken or refused, as they are and as a document, for the same reason."""
    outcome = _read(graph.to_json())
    if isinstance(outcome, Graph):
        validate(graph)
    else:
        with pytest.raises(InvalidGraph) as refusal:
            validate(graph)
        assert str(refusal.value) == str(outcome)


@given(json_values)
def test_random_json_as_nodes_is_taken_or_refused(nodes):
    """Whatever stands in the place of the nodes, or of one of them, is taken or refused."""
    document = {"format": "nnsight-hpc/graph", "version": 1, "model": {"id": "m"}, "kind": "trace", "saves": {}}
    for listed in (nodes, [nodes]):
        assert isinstance(_read(json.dumps({**document, "nodes": listed})), Graph | InvalidGraph)
