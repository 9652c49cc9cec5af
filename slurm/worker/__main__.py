"""``python -m nnsight_hpc.slurm.worker --home HOME --replica ID``."""

import logging
import os
import sys

from nnsight_hpc.slurm.worker.signals import block_signals

block_signals()  # before torch is imported: the default action of SIGUSR2 would kill a worker that is told to drain

from nnsight_hpc.slurm.worker.main import main  # noqa: E402 - only now

code = main()
logging.shutdown()
sys.stdout.flush()
os._exit(code)  # all that matters is written; Python would take torch apart for more than a second, holding the GPU
