"""From this login node on to the one where the daemon runs, by the cluster's own ssh."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

from nnsight_hpc.wire.places import HOME_VARIABLE, SCRATCH_VARIABLE, SITE_VARIABLE

_SSH_FAILED = 255  # ssh(1), EXIT STATUS
_OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR")


def bridge_on(host: str, executor: str, *, start: bool) -> int | None:
    """Let a bridge on `host` relay our stdin and stdout; its exit code, None where ssh did not get there.

    Nothing was read from stdin then. The bridge there goes on to no further host.
    """
    variables = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    bridge = [sys.executable, "-P", "-m", "nnsight_hpc.client", "bridge", "--executor", executor, "--stay"]
    command = shlex.join(["env", *variables, *bridge, *([] if start else ["--no-start"])])
    try:
        code = subprocess.run(["ssh", *_OPTIONS, "--", host, command], check=False).returncode
    except FileNotFoundError:
        return None
    return None if code == _SSH_FAILED else code


_VARIABLES = (HOME_VARIABLE, SCRATCH_VARIABLE, SITE_VARIABLE)
