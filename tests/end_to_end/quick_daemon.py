"""``python quick_daemon.py SETTINGS``: the daemon as it is, but for some of its periods and limits, given as JSON.

A failure that takes ten minutes to be believed is believed in seconds; nothing else is different.
"""

import dataclasses
import json
import sys

from nnsight_hpc.daemon.__main__ import run
from nnsight_hpc.daemon.config import config_for
from nnsight_hpc.slurm.batch.executor import executor
from nnsight_hpc.wire.places import places

if __name__ == "__main__":
    usual = config_for("slurm", places("slurm"))
    sys.exit(run(dataclasses.replace(usual, **json.loads(sys.argv[1])), executor("slurm")))
