"""The chain from a person to a forward on a worker, looked at link by link: which one is broken, and how to mend it."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from nnsight_hpc.client import config
from nnsight_hpc.client.config import LOCAL
from nnsight_hpc.client.overview import daemon_words
from nnsight_hpc.client.probe import probe_frame
from nnsight_hpc.client.session import Remote, bridge_command, connect, open_stream
from nnsight_hpc.client.share_socket import share_socket, sharing_process
from nnsight_hpc.client.waiting import check_completed, until_ended
from nnsight_hpc.client.words import serving
from nnsight_hpc.wire.checks import Check, Doubt, Finding, checked
from nnsight_hpc.wire.errors import Denied, HpcError
from nnsight_hpc.wire.frames import unpack
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import Hello, ModelIdentity, RequestStatus
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.pools import PoolStatus, Status

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from nnsight_hpc.client.config import Cluster
    from nnsight_hpc.client.transport import Transport

_CHECKS_SECONDS = 120.0
"""How long the daemon may take for its own checks: each of Slurm's programs may take half a minute."""
_FORWARD_SECONDS = 60.0
"""How long a worker may take until it has run one token: what others have asked for may be before it."""


def look(cluster: str | None) -> Iterator[Check]:
    """What is found at each link, the nearest first; what lies behind a broken one is not looked at.

    Parameters
    ----------
    cluster
        The profile, as `session.connect` takes it.
    """
    yield (check := checked("configuration", lambda: _configuration(cluster)))
    if check.finding is Finding.BROKEN:
        return
    profiles = config.load()
    name = profiles.chosen(cluster)
    profile = profiles.find(name)
    if profile is None:
        yield Check(link="ssh", finding=Finding.SKIPPED, found="the cluster local is this machine")
        yield from _from_daemon(connect(LOCAL))
    else:
        yield from _from_ssh(name, profile)


def _configuration(cluster: str | None) -> str:
    profiles = config.load()
    name = profiles.chosen(cluster)
    profile = profiles.find(name)
    how = f"{profile.host} by {profile.transport}" if profile else "this machine"
    return f"{config.config_file()}: the cluster {name} is {how}"


# -- on the way to the daemon ------------------------------------------------------------------------------------------


def _from_ssh(name: str, profile: Cluster) -> Iterator[Check]:
    """One login serves all: that of a running `connect`, or one of our own that ends with us."""
    peer = f"{name} ({profile.host})"
    if sharing_process(share_socket(profile)) is not None:
        yield Check(link="ssh", finding=Finding.WORKS, found="`nnsight-hpc connect` holds a connection")
        yield from _from_bridge(Remote(name, profile).open, peer)
        return
    from nnsight_hpc.client.transport import transport_for  # noqa: PLC0415 - `local` needs no SSH

    transport = transport_for(name, profile)
    try:
        yield (check := checked("ssh", lambda: _login(transport, profile)))
        if check.finding is not Finding.BROKEN:
            yield from _from_bridge(partial(open_stream, transport, bridge_command(profile), peer=peer), peer)
    finally:
        transport.close()


def _login(transport: Transport, profile: Cluster) -> str:
    transport.hold()
    return f"logged in to {profile.host}"


def _from_bridge(open_daemon: Callable[[], socket.socket], peer: str) -> Iterator[Check]:
    def bridge() -> str:
        open_daemon().close()
        return "nnsight-hpc runs there, and reaches its daemon"

    yield (check := checked("bridge", bridge))
    if check.finding is not Finding.BROKEN:
        yield from _from_daemon(HttpClient(open_daemon, peer=f"the daemon on {peer}"))


# -- at the daemon -----------------------------------------------------------------------------------------------------


def _from_daemon(daemon: HttpClient) -> Iterator[Check]:
    try:
        yield (check := checked("daemon", lambda: daemon_words(daemon.get("/v1/hello", Hello))))
        if check.finding is Finding.BROKEN:
            return
        yield checked("versions", lambda: _versions(daemon))
        yield from _daemons_own(daemon)
        yield from _workers(daemon)
    except HpcError as error:  # it was there a moment ago
        yield Check(link="daemon", finding=Finding.BROKEN, found=error.what, error=error.report())
    finally:
        daemon.close()


def _versions(daemon: HttpClient) -> str:
    ours, theirs = version("nnsight-hpc"), daemon.get("/v1/hello", Hello).version
    if ours != theirs:
        raise Doubt(
            f"here is version {ours}, the daemon is {theirs}",
            why="they understand each other, but what one of them can, the other may not",
            next="install the same version on both sides, then `nnsight-hpc daemon stop`",
        )
    return f"{ours} on both sides"


def _daemons_own(daemon: HttpClient) -> Iterator[Check]:
    """What the daemon finds: its home, the batch system, the pools."""
    try:
        yield from daemon.get("/v1/checks", list[Check], timeout=_CHECKS_SECONDS)
    except Denied as error:
        yield Check(link="home", finding=Finding.SKIPPED, found=error.what)


def _workers(daemon: HttpClient) -> Iterator[Check]:
    pools = daemon.get("/v1/status", Status).pools
    if not pools:
        yield Check(link="forward", finding=Finding.SKIPPED, found="there is no pool: nnsight-hpc up NAME --model …")
    for pool in pools:
        link = f"forward {pool.spec.name}"
        if pool.spec.factory:
            yield Check(link=link, finding=Finding.SKIPPED, found="it holds no language model")
        elif not serving(pool):
            yield Check(link=link, finding=Finding.SKIPPED, found="no replica serves")
        else:
            yield checked(link, partial(_forward, daemon, pool))


def _forward(daemon: HttpClient, pool: PoolStatus) -> str:
    """Send one token through the model; raises what has kept it from coming back."""
    request = new_request_id()
    frame = probe_frame(pool.model or ModelIdentity(id=pool.spec.model))
    try:
        daemon.put(f"/v1/requests/{request}?pool={pool.spec.name}", frame, RequestStatus)
    except Denied as error:  # so is the pool meant to be
        return f"not tried: {error.what}"
    status = until_ended(daemon, request, _FORWARD_SECONDS)
    if not status.state.ended:
        daemon.call("DELETE", f"/v1/requests/{request}")
        raise Doubt(
            f"one token was not through after {_FORWARD_SECONDS:.0f} s, and was cancelled",
            where=f"pool {pool.spec.name}",
            why=f"it was {status.state}, {status.position or 0} before it"
            + f"; {status.waits_for}" * bool(status.waits_for),
            next="`nnsight-hpc status` shows what the pool is busy with",
        )
    check_completed(status)
    unpack(daemon.call("GET", f"/v1/requests/{request}/result", timeout=300))
    times = list(status.times.values())
    return f"one token went through the model, {times[-1] - times[0]:.2f} s from end to end"
