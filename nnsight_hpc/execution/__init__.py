"""Runs a graph inside a model's forward: schedule, interleaving, values, errors at the user's line."""

from nnsight_hpc.execution.run import run_graph
from nnsight_hpc.execution.schedule import Point, Schedule, compile_graph

__all__ = ["Point", "Schedule", "compile_graph", "run_graph"]
