"""A real daemon with other periods and another worker program: ``run_daemon.py SETTINGS_AS_JSON WORKER_MODULE``.

With ``"batch": true`` among the settings, jobs wait and have a walltime (`tests.daemon.batch`).
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from nnsight_hpc.daemon.__main__ import run
from nnsight_hpc.daemon.config import config_for
from nnsight_hpc.slurm.batch.embedded import EmbeddedExecutor
from nnsight_hpc.wire.places import places
from tests.daemon.batch import Batch

settings, worker = json.loads(sys.argv[1]), sys.argv[2]
here = places("embedded")
executor = Batch(worker, here.home) if settings.pop("batch", False) else EmbeddedExecutor(worker, grace=2.0)
sys.exit(run(replace(config_for("embedded", here), **settings), executor))
