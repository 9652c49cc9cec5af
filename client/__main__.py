"""``python -m nnsight_hpc.client`` is ``nnsight-hpc``."""

from nnsight_hpc.client.cli import main

main()
