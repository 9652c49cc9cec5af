"""What a shell completes beyond commands and options: pools, requests and clusters, as far as they are known at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from nnsight_hpc.wire.errors import HpcError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import click
    from click.shell_completion import CompletionItem

    from nnsight_hpc.wire.messages import RequestStatus

T = TypeVar("T")

_PATIENCE = 2.0
"""Seconds that a person who pressed the tabulator waits for a daemon."""


def pool_names(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Pools with a definition, and those of the cluster's daemon where it can be asked without a login."""
    from nnsight_hpc.client import config  # noqa: PLC0415 - commands only declare this

    try:
        defined = set(config.load().pool)
    except HpcError:  # a broken configuration is told by the command itself
        return []
    return _beginning(defined | _running(context.find_root().obj.cluster), incomplete)


def request_ids(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Requests that the cluster's daemon shows, the latest first, where it can be asked without a login."""
    return _requests(context, incomplete, lambda _: True)


def waiting_requests(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Of these those that have not ended."""
    return _requests(context, incomplete, lambda request: not request.state.ended)


def pools_and_requests(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Any]:
    """Pools; requests for what begins as their ids do."""
    found = pool_names(context, parameter, incomplete)
    return [*found, *request_ids(context, parameter, incomplete)] if incomplete.startswith("r-") else found


def cluster_names(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The profiles."""
    from nnsight_hpc.client import config  # noqa: PLC0415 - as above

    try:
        return _beginning({config.LOCAL, *config.load().cluster}, incomplete)
    except HpcError:
        return []


def _running(cluster: str | None) -> set[str]:
    from nnsight_hpc.wire.pools import Status  # noqa: PLC0415 - as above

    try:
        return {pool.spec.name for pool in _asked(cluster, "/v1/status?limit=0", Status).pools}
    except HpcError:
        return set()


def _requests(context: click.Context, incomplete: str, wanted: Callable[[RequestStatus], bool]) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem  # noqa: PLC0415 - as above

    from nnsight_hpc.client.words import request_words  # noqa: PLC0415
    from nnsight_hpc.wire.messages import RequestStatus  # noqa: PLC0415

    try:
        found = _asked(context.find_root().obj.cluster, "/v1/requests", list[RequestStatus])
    except HpcError:
        return []
    shown = [one for one in reversed(found) if one.id.startswith(incomplete) and wanted(one)]
    return [CompletionItem(one.id, help=request_words(one)) for one in shown]


def _asked(cluster: str | None, path: str, as_type: type[T]) -> T:
    from nnsight_hpc.client.session import connect  # noqa: PLC0415 - as above

    return connect(cluster, start=False, login=False).get(path, as_type, timeout=_PATIENCE)


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))
