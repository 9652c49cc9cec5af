"""A job that begins when it may, does nothing, and is killed at the end of its walltime; USR2 ends it well."""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path


def keep_time() -> Path:
    """Wait for the begin, and let the alarm kill this process at the end; the home of its daemon."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path)
    parser.add_argument("--replica")
    given = parser.parse_args()
    known = json.loads((given.home / "replicas" / given.replica / "batch.json").read_bytes())
    time.sleep(max(0.0, known["starts"] - time.time()))
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, max(0.01, known["ends"] - time.time()))
    print("it runs", flush=True)
    return given.home


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit(0))
    keep_time()
    while True:
        signal.pause()
