"""Process 1 of a host: furnishes the host's own view of the file system, then stays as long as the host is up.

Run as ``unshare --fork --pid --mount --net … python -I -S host_init.py``: standard library only. Its first line of
input is a `Furnishing` as JSON; it answers with its process number as the machine sees it. When it ends, the kernel
ends every process of the host, and with the last one go its mounts and its network.

The other end of its input is held by the process that owns the cluster: end of file means that the owner is gone, and
the host goes down with it. A second line, ``stay``, lets it live on.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def mount(*arguments: str, descriptors: tuple[int, ...] = ()) -> None:
    subprocess.run(["mount", *arguments], check=True, pass_fds=descriptors)


def forget_named_namespaces() -> None:
    """Drop the copies of the machine's named namespaces, which would live on here after their owner removed them."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "nsfs":
            subprocess.run(["umount", path], check=True)


def cover(empty: dict[str, str], keep: list[str]) -> None:
    """Put a new, empty folder over each of `empty` (path to mode), and bring the paths of `keep` back into them."""
    kept = {path: os.open(path, os.O_PATH) for path in keep}
    for path, mode in sorted(empty.items()):
        mount("-t", "tmpfs", "-o", f"mode={mode},nosuid", "nnsight-hpc-test", path)
    for path, descriptor in kept.items():
        make_mount_point(Path(path), is_folder=os.path.isdir(f"/proc/self/fd/{descriptor}"))  # noqa: PTH112 - a magic link
        mount("--no-canonicalize", "--rbind", f"/proc/self/fd/{descriptor}", path, descriptors=(descriptor,))
        os.close(descriptor)


def make_mount_point(path: Path, *, is_folder: bool) -> None:
    if is_folder:
        path.mkdir(parents=True, exist_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def furnish(plan: dict[str, Any]) -> None:
    """Make the mounts and folders that `plan`, a `Furnishing`, asks for; see there."""
    socket.sethostname(plan["hostname"])
    forget_named_namespaces()
    cover(plan["empty"], plan["keep"])
    for folder in plan["folders"]:
        Path(folder).mkdir(parents=True)
    for target, source in plan["binds"].items():
        mount("--bind", source, target)
    mount("-t", "proc", "proc", "/proc")


def main() -> None:
    os.umask(0o022)
    pid = int(Path("/proc/self").readlink().name)  # /proc is still the machine's: its number for this process
    furnish(json.loads(sys.stdin.readline()))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then reaps the orphans that process 1 inherits
    print(pid, flush=True)
    if sys.stdin.readline() == "stay\n":
        while True:
            signal.pause()


if __name__ == "__main__":
    main()
