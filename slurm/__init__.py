"""Pools' jobs: `batch` submits and watches them (no torch), `worker` is the program that runs inside."""
