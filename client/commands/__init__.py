"""The commands, one module for each group; `nnsight_hpc.client.cli` imports them by need."""
