"""The OpenAPI 3.1 description of the HTTP interface for people, made of `operations` and of the messages themselves.

Source: OpenAPI Specification 3.1.1, https://spec.openapis.org/oas/v3.1.1.html
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, get_args

import msgspec

from nnsight_hpc import __version__
from nnsight_hpc.daemon.operations import BYTES, DOCUMENT, DONE, OPERATIONS, PARTS, TEXT, Operation
from nnsight_hpc.wire.errors import ErrorReport
from nnsight_hpc.wire.http import ERROR, FRAME, JSON
from nnsight_hpc.wire.pools import PoolSpec

_ABOUT = (
    "What `nnsight-hpc` and other programs ask of the daemon, over its Unix socket or through the bridge. The user is the "
    "peer of the socket, as the kernel says; there is no other login. Every error is an `ErrorReport`."
)
_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    BYTES: (FRAME, {"type": "string", "format": "binary"}),
    TEXT: ("text/plain", {"type": "string"}),
    DONE: (JSON, {"type": "object", "maxProperties": 0}),
    DOCUMENT: (JSON, {"type": "object"}),
}
_GIVEN = "PoolGiven"
"""The body that asks for a pool: the keys of `PoolSpec` that were given; the site may have others."""


@cache
def description() -> bytes:
    """The document as JSON; the same bytes each time."""
    types = {body for operation in OPERATIONS for body in (operation.answer, operation.sent) if _is_message(body)}
    structs = sorted({_struct_of(body) for body in types} | {ErrorReport}, key=lambda struct: struct.__name__)
    _, components = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    spec = components[PoolSpec.__name__]
    keys = {key: value for key, value in spec["properties"].items() if key != "name"}
    components[_GIVEN] = {"title": _GIVEN, "type": "object", "properties": keys, "additionalProperties": False}
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    document = {
        "openapi": "3.1.0",
        "info": {"title": "nnsight-hpc", "version": __version__, "description": _ABOUT, "license": {"name": "MIT"}},
        "servers": [{"url": "http://nnsight-hpc", "description": "the Unix socket that lease.json names"}],
        "paths": paths,
        "components": {"schemas": dict(sorted(components.items()))},
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


def _operation(operation: Operation) -> dict[str, Any]:
    found = {
        "operationId": _id(operation),
        "summary": operation.summary,
        "parameters": [
            *({"name": part, "in": "path", "required": True, "schema": PARTS[part]} for part in _parts(operation)),
            *(
                {"name": one.name, "in": "query", "schema": one.schema, "description": one.description}
                | ({"required": True} if one.required else {})
                for one in operation.query
            ),
        ],
        "responses": {
            "200": {"description": "As asked.", "content": _content(operation.answer)},
            "default": {
                "description": "What was wrong, where, why, and what to do next.",
                "content": {ERROR: {"schema": _reference(ErrorReport)}},
            },
        },
    }
    if operation.sent is PoolSpec:
        schema = {"$ref": f"#/components/schemas/{_GIVEN}"}
        return found | {"requestBody": {"required": True, "content": {JSON: {"schema": schema}}}}
    return found | ({"requestBody": {"required": True, "content": _content(operation.sent)}} if operation.sent else {})


def _id(operation: Operation) -> str:
    """``get_pools_name_log``: the method and the parts of the path."""
    return "_".join([operation.method, *re.findall(r"[a-z]+", operation.path.removeprefix("/v1"))])


def _parts(operation: Operation) -> list[str]:
    return re.findall(r"\{(\w+)\}", operation.path)


def _is_message(body: Any) -> bool:
    return body is not None and body not in _OTHERS


def _struct_of(body: Any) -> type[msgspec.Struct]:
    """The message, or that of which a list is."""
    found: type[msgspec.Struct] = next(iter(get_args(body)), body)
    return found


def _content(body: Any) -> dict[str, Any]:
    if body in _OTHERS:
        kind, schema = _OTHERS[body]
        return {kind: {"schema": schema}}
    reference = _reference(_struct_of(body))
    return {JSON: {"schema": {"type": "array", "items": reference} if get_args(body) else reference}}


def _reference(struct: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{struct.__name__}"}
