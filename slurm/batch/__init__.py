"""Starts, watches and ends the jobs of replicas: through Slurm, or as local processes. No torch.

`executor` is the contract and `executor.executor(name)` the way in; `slurm` and `embedded` fulfil it.
"""
