"""The cables of the test cluster: a switch with two networks that have nothing in common but the login nodes.

The cluster's network joins login nodes and compute nodes; the outer one joins the laptop to the login nodes. Both lie
in the network namespace of the switch, and no host has a default route: no packet can leave the machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .layout import HOSTS

if TYPE_CHECKING:
    from .hosts import Host
    from .layout import HostSpec

_BRIDGES = ("inside", "outside")


def start_switch(switch: Host) -> None:
    switch.network_commands("".join(f"link add {name} type bridge\nlink set {name} up\n" for name in _BRIDGES))


def plug_in(switch: Host, host: Host, spec: HostSpec) -> None:
    """Connect `host` to the networks that it has an address in."""
    host.network_commands("link set lo up\n")
    for bridge in _BRIDGES:
        address: str = getattr(spec, bridge)
        if address:
            port = f"{bridge[0]}{host.init.pid}"  # a host that boots again comes before its old port is gone
            switch.network_commands(
                f"link add {port} type veth peer name {bridge} netns {host.init.pid}\n"
                f"link set {port} master {bridge} up\n"
            )
            host.network_commands(
                f"link set {bridge} address {_hardware_address(address)}\n"
                f"addr add {address}/24 dev {bridge}\n"
                f"link set {bridge} up\n"
            )


def cut_off(host: Host) -> None:
    _set_cables(host, "down")


def join(host: Host) -> None:
    _set_cables(host, "up")


def _set_cables(host: Host, state: str) -> None:
    bridges = [bridge for bridge in _BRIDGES if getattr(HOSTS[host.name], bridge)]
    host.network_commands("".join(f"link set {bridge} {state}\n" for bridge in bridges))


def _hardware_address(address: str) -> str:
    """One for each IP address: neighbours need not find out that the host has booted again."""
    return "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))
