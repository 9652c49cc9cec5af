"""Runs a graph inside a model's forward: schedule, interleaving, values, errors at the user's line."""

from nnsight_hpc.execution.run import run_graph

__all__ = ["run_graph"]
