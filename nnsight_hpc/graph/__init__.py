"""The intervention graph as data: nodes, allowed operations by name, JSON codec, validation, text. No torch."""

from nnsight_hpc.graph.build import GraphBuilder, capture_graph, expand_points
from nnsight_hpc.graph.nodes import Device, DType, Graph, Node, Ref, Seed, Source, TensorRef
from nnsight_hpc.graph.validation import validate

__all__ = [
    "DType",
    "Device",
    "Graph",
    "GraphBuilder",
    "Node",
    "Ref",
    "Seed",
    "Source",
    "TensorRef",
    "capture_graph",
    "expand_points",
    "validate",
]
