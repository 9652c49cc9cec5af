"""Fetching the result of a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnsight_hpc.wire.http import HttpClient


def fetch_result(client: HttpClient, request: str) -> memoryview:
    """The frame of a completed request's result.

    A patient client (`patience.PatientClient`) whose connection is lost asks for what is missing, not for all of it again.
    """
    frame = bytearray()
    client.download(f"/v1/requests/{request}/result", frame.extend, timeout=300)
    return memoryview(frame)
