"""The description of the HTTP interface says what is so: its routes are those of the daemon, its answers what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode, checks

from nnsight_hpc.daemon.openapi import description
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.names import new_request_id
from tests.daemon.process import dump_frame, send
from tests.daemon.unix_session import HOST, unix_session

if TYPE_CHECKING:
    import requests

    from tests.daemon.process import DaemonProcess, Worker

ROOT = Path(__file__).parents[2]
DOCUMENT = json.loads(description())
EXAMPLES = 10
"""Requests for each operation, of each mode, twice: with names by chance, and of what is there."""


@pytest.fixture(scope="module")
def session(daemon: DaemonProcess) -> requests.Session:
    return unix_session(daemon.lease().socket)


@pytest.fixture(scope="module")
def known(daemon: DaemonProcess, worker: Worker) -> dict[str, str]:
    """What is there: a pool, whose replica has a log, a request that has ended, and a dump that waits."""
    send(daemon.people(), request := new_request_id())
    worker.finish(worker.lease())
    daemon.people().put(f"/v1/datasets/smol?pool=smol&request={new_request_id()}", dump_frame("smol"), RequestStatus)
    return {"name": "smol", "id": request}


def test_every_route_is_described_and_every_description_has_its_route(session):
    """The operations of the document are the routes that the daemon says it has, none more and none less."""
    described = {(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item}
    assert described == _routes()


def _routes() -> set[tuple[str, str]]:
    """Of the real application, without what aiohttp adds by itself (HEAD)."""
    program = """
import asyncio, json
from unittest.mock import MagicMock
from nnsight_hpc.daemon.people import people_app
async def main():
    app = people_app(MagicMock())
    print(json.dumps([(r.method, r.resource.canonical) for r in app.router.routes() if r.method != "HEAD"]))
asyncio.run(main())
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {tuple(route) for route in json.loads(found.stdout)}


def test_every_parameter_that_is_read_is_described():
    """The names of queries that the handlers read are those of the document."""
    handlers = [*(ROOT / "daemon").glob("*_api.py"), *(ROOT / "daemon" / f"{name}.py" for name in _OTHERS)]
    source = "".join(path.read_text() for path in handlers)
    read = re.findall(r'(?:\(request, |query\.get\(|query\[)"(\w+)"|"(\w+)" in request\.query', source)
    described = {
        one["name"]
        for item in DOCUMENT["paths"].values()
        for operation in item.values()
        for one in operation["parameters"]
        if one["in"] == "query"
    }
    assert {first or second for first, second in read} == described


_OTHERS = ("people", "datasets", "models", "watching", "arrivals", "web")
"""Modules with handlers, or parts of them, that are not named after them."""


def test_the_daemon_serves_its_description(session):
    """What is served is what the reference has."""
    assert session.get(f"{HOST}/v1/openapi.json").content == description()


def test_the_reference_is_up_to_date():
    """The page and the document of the reference are what the tool makes of the description."""
    subprocess.run([sys.executable, ROOT / "tools" / "http-page", "--check"], check=True)


SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = {
    found.ok().definition.raw["operationId"]: found.ok()
    for found in SCHEMA.get_all_operations()
    if found.ok().path != "/v1/stop"  # ends the daemon, which others test
}
CASES = sorted(
    (
        (name, mode)
        for name, operation in OPERATIONS.items()
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or operation.definition.raw["parameters"]  # else nothing could be wrong
    ),
    key=lambda case: (case[0].startswith("delete"), case[0] == "delete_pools", case[1] is GenerationMode.NEGATIVE),
)
"""What removes something comes last, and what removes all at the very end."""
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
_ANSWERED = {name for name in OPERATIONS if not name.startswith("put") and "dataset" not in name}
ANSWERED = {"get_datasets", *_ANSWERED} - {
    "get_pools_name_model",  # no worker has found the model
    "get_pools_name_model_file",
    "post_pools_name_plan",  # a body by chance is no pool
    "post_requests_id",  # nor a graph
    "post_dumps_name_verify",  # there is no dataset yet
    "post_dumps_name_repair",
}
"""Operations that have to be answered at least once as asked, of which others are refused for what they are asked for."""


@pytest.mark.parametrize(("name", "mode"), CASES, ids=lambda part: getattr(part, "value", part))
def test_answers_are_as_described(session, known, name, mode):
    """Whether a call fits the description or not, its answer is as described, and none makes the daemon fail."""
    operation, statuses = OPERATIONS[name], set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        for parameters in (case.path_parameters, {**case.path_parameters, **known}):
            case.path_parameters = {part: parameters[part] for part in case.path_parameters}
            if isinstance(case.query.get("wait"), float | int):
                case.query["wait"] = 0  # nobody waits here
            response = case.call(base_url=HOST, session=session, timeout=60)
            statuses.add(response.status_code)
            case.validate_response(response, checks=CHECKS)

    check()
    if mode is GenerationMode.POSITIVE and name in ANSWERED:
        assert 200 in statuses
