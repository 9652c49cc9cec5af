"""Where a running ``nnsight-hpc connect`` offers its connection: a socket of this user on this machine."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.client.launch import open_socket
from nnsight_hpc.wire.identity import peer
from nnsight_hpc.wire.places import runtime_folder

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.client.config import Cluster


WANTED, WANTED_IF_RUNNING, WANTED_FILES = b"+", b"=", b"f"
"""What a client sends to be given a channel: to a daemon that is started by need, to one that runs already, or to one's
own datasets.

One that only wants to know whether somebody listens sends nothing.
"""


def share_socket(cluster: Cluster) -> Path:
    """Named after the whole profile: one that has been changed does not find the old connection."""
    digest = hashlib.sha256(msgspec.json.encode(cluster)).hexdigest()
    return runtime_folder() / f"connect-{digest[:16]}.sock"


def sharing_process(path: Path) -> int | None:
    """The process that listens at `path`, as the kernel tells it, or None."""
    try:
        stream = open_socket(path)
    except OSError:
        return None
    with stream:
        return peer(stream).pid
