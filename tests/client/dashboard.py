"""``nnsight-hpc dashboard`` as a process, and what comes from its port."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from tests.client.program import PROGRAM
from tests.daemon.process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@contextmanager
def daemon_of_ones_own() -> Iterator[DaemonProcess]:
    folder = Path(tempfile.mkdtemp(prefix="d-"))
    with DaemonProcess(folder) as daemon:
        yield daemon
    shutil.rmtree(folder, ignore_errors=True)


def folder_of(daemon: DaemonProcess) -> Path:
    return daemon.places.home.parents[1]


def places_of(daemon: DaemonProcess) -> dict[str, str]:
    """The environment of a program that is to find that daemon."""
    places = {"NNSIGHT_HPC_HOME": "state", "XDG_RUNTIME_DIR": "run", "NNSIGHT_HPC_CONFIG": "config.toml"}
    return {**os.environ, **{name: str(folder_of(daemon) / place) for name, place in places.items()}}


class DashboardProcess:
    """Runs until the block ends; `url` is what it has printed."""

    def __init__(self, *options: str, environment: Mapping[str, str], cluster: str = "local") -> None:
        command = [*PROGRAM, "-c", cluster, "dashboard", *options]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.url = self.process.stdout.readline().strip()
        self.port, self.path = urlsplit(self.url).port, urlsplit(self.url).path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def interrupt(self) -> tuple[int, str, str]:
        """Ctrl-C; the exit code, and what was said since."""
        self.process.send_signal(signal.SIGINT)
        said = self.process.communicate(timeout=120)
        return self.process.returncode, *said

    def ask(self, path: str = "", method: str = "GET", **headers: str) -> tuple[int, dict[str, Any], bytes]:
        """Status, headers and body of an answer; `path` is below the secret unless it begins with a slash."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path if path.startswith("/") else self.path + path, headers=headers)
        response = connection.getresponse()
        found = response.status, dict(response.getheaders()), response.read()
        connection.close()
        return found
