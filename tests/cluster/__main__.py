"""The test cluster by hand: ``python -m tests.cluster up``, ``status``, ``shell HOST [USER]``, ``down``; as root."""

from __future__ import annotations

import argparse
import os
import sys

from nnsight_hpc.wire.errors import Conflict, HpcError

from .cleanup import find, sweep
from .cluster import Cluster
from .layout import HOSTS, LOGINS

_NAME = "manual"


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.action(arguments))
    except HpcError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("--name", default=_NAME, help="which cluster, where several are up (default: %(default)s)")
    actions = parser.add_subparsers(required=True)
    for name, action in {"up": _up, "down": _down, "status": _status, "shell": _shell}.items():
        sub = actions.add_parser(name, help=action.__doc__)
        sub.set_defaults(action=action)
    sub.add_argument("host", choices=HOSTS)
    sub.add_argument("user", nargs="?", help="default: root on the laptop, alice elsewhere")
    return parser


def _up(arguments: argparse.Namespace) -> int:
    """Start it"""
    if find(arguments.name) is not None:
        raise Conflict(f"the test cluster {arguments.name} is up", next="make cluster-down")
    cluster = Cluster.up(name=arguments.name)
    cluster.keep()
    shell = f"{sys.executable} -m tests.cluster shell"
    print(f"A Slurm cluster is up. Its files, and its logs in log/: {cluster.laptop_home.parent}")
    print(f"  on the laptop:      {shell} laptop")
    print("  from there, by SSH: ssh alice@login  (or login2; the key and the host keys are in place)")
    print(f"  on a login node:    {shell} login alice  (or bob, or root)")
    print("  then:               sinfo; srun --nodes=2 hostname")
    print("Remove it with:       make cluster-down")
    return 0


def _down(arguments: argparse.Namespace) -> int:
    """Remove it, and what crashed test runs have left"""
    swept = sweep()
    if find(arguments.name) is not None:
        Cluster.attach(arguments.name).down()
        swept.append(arguments.name)
    print(f"removed: {', '.join(swept)}" if swept else "no test cluster was up")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    """Show hosts, nodes and jobs"""
    cluster = Cluster.attach(arguments.name)
    for host in cluster.hosts:
        print(f"{host:8} {cluster.address(host):12} {'up' if cluster.is_up(host) else 'down'}")
    for command in (["sinfo"], ["squeue"]):
        print(cluster.run(LOGINS[0].name, command, user="root").stdout, end="")
    return 0


def _shell(arguments: argparse.Namespace) -> int:
    """Open a shell on a host"""
    terminal = {"TERM": os.environ.get("TERM", "dumb")}
    cluster = Cluster.attach(arguments.name)
    return cluster.popen(arguments.host, ["/bin/bash"], user=arguments.user, env=terminal).wait()


if __name__ == "__main__":
    sys.exit(main())
