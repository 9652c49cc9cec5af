"""``python -m nnsight_hpc.daemon --executor NAME``: a daemon in the foreground, which logs to its standard error."""

from __future__ import annotations

import argparse
import asyncio
import sys

from nnsight_hpc.daemon.config import Config, config_for
from nnsight_hpc.daemon.errors import of_disk
from nnsight_hpc.daemon.log_file import TurnedOver
from nnsight_hpc.daemon.server import serve
from nnsight_hpc.slurm.batch.executor import Executor, executor
from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.logs import log_as_json
from nnsight_hpc.wire.places import places


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nnsight_hpc.daemon", description="Run the daemon.")
    parser.add_argument("--executor", choices=("slurm", "embedded"), required=True, help="what runs the workers")
    name = parser.parse_args().executor
    return run(config_for(name, places(name)), executor(name))


def run(config: Config, jobs: Executor) -> int:
    """Serve until told to stop; the exit code."""
    log_as_json("daemon", handler=TurnedOver(config.places.log))
    try:
        asyncio.run(serve(config, jobs))
    except OSError as error:
        return _fail(of_disk(error, str(config.places.home)))
    except HpcError as error:
        return _fail(error)
    return 0


def _fail(error: HpcError) -> int:
    print(error, file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
