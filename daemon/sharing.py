"""Who may do what: the one place that keeps the users of a shared daemon apart.

Its owner may do and see all. Others use the pools that there are, and have requests and datasets of their own, which are
seen by nobody else but the owner. What does not stand in `_FOR_ALL` is the owner's.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from aiohttp import web

from nnsight_hpc.daemon.identity import identify
from nnsight_hpc.daemon.refusals import check_own
from nnsight_hpc.daemon.web import skip_body
from nnsight_hpc.storage import dataset_folder
from nnsight_hpc.wire.errors import Denied

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler, Middleware

    from nnsight_hpc.daemon.parts import Parts

logger = logging.getLogger(__name__)

_REQUEST, _DATASET, _DUMP = "/v1/requests/{id}", "/v1/datasets/{name}", "/v1/dumps/{name}"
_FOR_ALL = {
    "/v1/hello": {"GET"},
    "/v1/status": {"GET"},
    "/v1/openapi.json": {"GET"},
    "/v1/dashboard": {"GET"},
    "/v1/dashboard/{page}": {"GET"},
    "/v1/pools/{name}": {"GET"},
    "/v1/pools/{name}/model": {"GET"},
    "/v1/pools/{name}/model/{file}": {"GET"},
    "/v1/pools/{name}/story": {"GET"},
    "/v1/requests": {"GET"},
    _REQUEST: {"PUT", "POST", "GET", "DELETE"},
    f"{_REQUEST}/log": {"GET"},
    f"{_REQUEST}/story": {"GET"},
    f"{_REQUEST}/result": {"GET"},
    "/v1/datasets": {"GET"},
    _DATASET: {"PUT", "GET", "DELETE"},
    f"{_DATASET}/files": {"GET"},
    "/v1/dumps": {"GET"},
    _DUMP: {"GET"},
    **{f"{_DUMP}/{what}": {"POST"} for what in ("pause", "resume", "verify", "repair")},
    f"{_DATASET}/files/{{path}}": {"GET"},
}
"""Routes, as they are registered, and their methods."""


def may_see(request: web.Request, user: str) -> bool:
    """Whether the sender of `request` may see what belongs to `user`."""
    return bool(request["owner"]) or request["user"] == user


def keep_apart(parts: Parts) -> Middleware:
    """Says who the user is, and refuses what he may not do."""
    guard = _Guard(parts)

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            request["user"], request["owner"] = identify(request, parts.share)
            if not request["owner"]:
                await guard.check(request)
        except Denied as error:
            logger.warning("refused %s %s: %s", request.method, request.path, error.what)
            await skip_body(request)  # a client that still sends hears why
            raise
        return await handler(request)

    return check


class _Guard:
    """Looks at requests of users who are not the owner."""

    def __init__(self, parts: Parts) -> None:
        self._views, self._owner, self._datasets = parts.views, parts.hello.owner, parts.config.places.datasets

    async def check(self, request: web.Request) -> None:
        resource = request.match_info.route.resource
        if resource is None:
            return  # there is no such route, and aiohttp says so
        self._check_route(request, resource.canonical)
        where = f"{request.method} {request.path}"
        if identifier := request.match_info.get("id") or request.query.get("request"):
            row = await self._views.peek(identifier)
            if row is not None:
                check_own(f"request {identifier}", row.user, request["user"], where=where)
        if resource.canonical.startswith((_DATASET, _DUMP)):
            name = request.match_info["name"]
            if user := await self._user_of_dataset(name):
                check_own(f"dataset {name}", user, request["user"], where=where)

    def _check_route(self, request: web.Request, route: str) -> None:
        if request.method not in _FOR_ALL.get(route, ()):
            raise Denied(
                f"only {self._owner}, whose daemon this is, may do that",
                where=f"{request.method} {request.path}",
                why=f"you are {request['user']}",
                next=f"ask {self._owner}",
            )

    async def _user_of_dataset(self, name: str) -> str | None:
        """Who has asked for it; what lies there and nobody has asked for is the owner's. None where there is none."""
        row = await self._views.dataset(name)
        if row is not None:
            return row.user
        return self._owner if dataset_folder(self._datasets, name).exists() else None
