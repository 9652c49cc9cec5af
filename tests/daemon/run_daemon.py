"""A real daemon with other periods and another worker program: ``run_daemon.py SETTINGS_AS_JSON WORKER_MODULE``."""

import json
import sys
from dataclasses import replace

from nnsight_hpc.daemon.__main__ import run
from nnsight_hpc.daemon.config import config_for
from nnsight_hpc.slurm.batch.embedded import EmbeddedExecutor
from nnsight_hpc.wire.places import places

settings, worker = json.loads(sys.argv[1]), sys.argv[2]
sys.exit(run(replace(config_for("embedded", places("embedded")), **settings), EmbeddedExecutor(worker, grace=2.0)))
