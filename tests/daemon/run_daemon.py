"""A real daemon with other periods and another worker program: ``run_daemon.py SETTINGS_AS_JSON WORKER_MODULE``.

With ``"batch": true`` among the settings, jobs wait and have a walltime (`tests.daemon.batch`); with ``"copying": SECONDS``
its database is so large that it takes so long to take over.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from nnsight_hpc.daemon import server
from nnsight_hpc.daemon.__main__ import run
from nnsight_hpc.daemon.config import config_for
from nnsight_hpc.slurm.batch.embedded import EmbeddedExecutor
from nnsight_hpc.wire.places import places
from tests.daemon.batch import Batch

settings, worker = json.loads(sys.argv[1]), sys.argv[2]
here = places("embedded")
executor = Batch(worker, here.home) if settings.pop("batch", False) else EmbeddedExecutor(worker, grace=2.0)
seconds, take_over = settings.pop("copying", 0.0), server.take_over
server.take_over = lambda *arguments: (time.sleep(seconds), take_over(*arguments))[1]
sys.exit(run(replace(config_for("embedded", here), **settings), executor))
