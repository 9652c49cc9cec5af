"""Experiments that run as they are: ``python -m nnsight_hpc.examples.first_experiment``."""
