"""Slurm's configuration and the commands of its daemons, in the foreground, and of munge, which Slurm trusts."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from .layout import COMPUTE, GPUS_PER_NODE, LOGINS, Folders, make_folder, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping

CONTROLLER = LOGINS[0]
CONTROLLER_PORT = 6817
NODE_PORT = 6818
MUNGE_SOCKET = "/run/munge/munge.socket.2"
SCAVENGE = "scavenge"
"""The partition of all nodes whose jobs give way to those of the other one."""
_NODE = "Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000"


def write_config(folders: Folders, overrides: Mapping[str, str]) -> None:
    """Fill a folder that hosts see as /etc/slurm. `overrides` are settings of slurm.conf, by name."""
    etc = folders.etc / "slurm"
    make_folder(etc)
    settings = _settings(folders) | dict(overrides)
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [f"NodeName={n.name} NodeAddr={n.inside} {_NODE} Gres=gpu:{GPUS_PER_NODE}" for n in COMPUTE]
    nodes = ",".join(n.name for n in COMPUTE)
    common = f"Nodes={nodes} MaxTime=1-00:00:00 State=UP"
    lines.append(f"PartitionName=gpu Default=YES PriorityTier=2 PreemptMode=OFF {common}")
    lines.append(f"PartitionName={SCAVENGE} PriorityTier=1 PreemptMode=REQUEUE {common}")
    write_text(etc / "slurm.conf", "\n".join(lines) + "\n")
    write_text(etc / "gres.conf", f"NodeName={nodes} Name=gpu File={folders.spool}/gpu[0-{GPUS_PER_NODE - 1}]\n")
    # Hosts have an empty /sys/fs/cgroup: slurmd insists on one, but nothing configured here uses it.
    write_text(etc / "cgroup.conf", "CgroupPlugin=cgroup/v1\n")
    _make_gpus(folders)
    _make_munge_key(folders)


def _settings(folders: Folders) -> dict[str, str]:
    return {
        "ClusterName": "test",
        "SlurmctldHost": f"{CONTROLLER.name}({CONTROLLER.inside})",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "SlurmctldPort": str(CONTROLLER_PORT),
        "SlurmdPort": str(NODE_PORT),
        "AuthType": "auth/munge",
        "StateSaveLocation": f"{folders.spool}/state",
        "SlurmdSpoolDir": f"{folders.spool}/%n",
        "SlurmctldPidFile": "/run/slurmctld.pid",
        "SlurmdPidFile": "/run/slurmd.pid",
        "SlurmdParameters": "config_overrides",  # a node is as large as it says below, whatever machine it runs on
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "MpiDefault": "pmix",
        "ReturnToService": "2",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",  # where a job forbids it, it is ended
        "SchedulerParameters": "sched_interval=2,bf_interval=5",
        "KillWait": "5",
        "InactiveLimit": "0",
        "SlurmdTimeout": "15",
        "MinJobAge": "300",
        "GresTypes": "gpu",
        "AccountingStorageType": "accounting_storage/none",
    }


def controller_command() -> list[str]:
    return ["/usr/sbin/slurmctld", "-D"]


def node_command(node: str) -> list[str]:
    return ["/usr/sbin/slurmd", "-D", "-N", node]


def munge_command(folders: Folders, host: str) -> list[str]:
    """``--force``: munged refuses, otherwise, a key below a folder that is not its own user's."""
    names = {"key-file": folders.etc / "munge.key", "seed-file": folders.spool / f"munge.seed.{host}"}
    files = [f"--{option}={path}" for option, path in names.items()]
    return [
        "/usr/sbin/munged",
        "--foreground",
        "--force",
        f"--socket={MUNGE_SOCKET}",
        "--pid-file=/run/munge/pid",
        *files,
    ]


def _make_gpus(folders: Folders) -> None:
    """Slurm hands out character devices only; these are others like /dev/zero (1, 5)."""
    for number in range(GPUS_PER_NODE):
        os.mknod(folders.spool / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 5))


def _make_munge_key(folders: Folders) -> None:
    key = folders.etc / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
