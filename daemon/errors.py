"""Errors on their way out: every one becomes an `ErrorReport`, none shows a traceback."""

from __future__ import annotations

import errno
import logging
import secrets
from typing import TYPE_CHECKING

from aiohttp import web

from nnsight_hpc.wire.errors import HpcError, InvalidInput, NotFound
from nnsight_hpc.wire.http import ERROR
from nnsight_hpc.wire.messages import encode

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

logger = logging.getLogger(__name__)


def error_response(error: HpcError, *, status: int | None = None) -> web.Response:
    return web.Response(status=status or error.http_status, body=encode(error.report()), content_type=ERROR)


@web.middleware
async def errors_as_reports(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except HpcError as error:
        return error_response(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return error_response(_of_http(error, request), status=error.status)
    except ConnectionError:
        raise  # the other side is gone: there is nobody to tell
    except OSError as error:
        return error_response(of_disk(error) if error.errno else _incident(request, error))
    except Exception as error:  # noqa: BLE001 - logged with its traceback, told without
        return error_response(_incident(request, error))


def _of_http(error: web.HTTPException, request: web.Request) -> HpcError:
    kind = NotFound if error.status == 404 else InvalidInput
    return kind(f"the daemon has no answer to {request.method} {request.path}", why=error.text or error.reason)


def of_disk(error: OSError, home: str = "") -> HpcError:
    """Words for a file that cannot be read or written: in the daemon's home, where the error does not say which."""
    logger.error("%s", error)
    return HpcError(
        "the daemon cannot read or write a file",
        where=str(error.filename or home),
        why=error.strerror or str(error),
        next=_NEXT.get(error.errno or 0, ""),
    )


_ROOM = "free space in the daemon's home (`nnsight-hpc status` names it), or have your quota raised, and try again"
_NEXT = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EROFS: "its file system cannot be written just now: ask who runs it, and try again",
}


def _incident(request: web.Request, error: Exception) -> HpcError:
    incident = secrets.token_hex(4)
    words = ("incident %s in %s %s", incident, request.method, request.path)
    logger.error(*words, exc_info=error, extra={"incident": incident})
    return HpcError(
        "the daemon met an error that it did not expect",
        where=f"{request.method} {request.path}, incident {incident}",
        next=f"`nnsight-hpc daemon logs` shows what lies behind it: look for {incident}",
    )
