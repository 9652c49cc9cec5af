"""pytest: the fixture `cluster`, the marker of tests that use it, and the check that a session leaves nothing behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from . import leaks
from .cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("cluster")


@pytest.fixture(scope="session", autouse=True)
def test_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[leaks.Session]:
    """The session's mark and temporary folder; fails at its end when something is left over."""
    with leaks.Session(marks=(str(tmp_path_factory.getbasetemp()),)) as session:
        before = session.snapshot()
        yield session
        left = session.leaks(before)
    if left:
        pytest.fail("The test session left behind:\n" + "\n".join(left), pytrace=False)


@pytest.fixture(scope="session")
def cluster_readable_paths() -> list[Path]:
    """Further paths that the cluster's users must be able to read; override it in tests/conftest.py."""
    return []


@pytest.fixture(scope="session")
def cluster(test_session: leaks.Session, cluster_readable_paths: list[Path]) -> Iterator[Cluster]:
    """The test cluster, one for the whole session: tests end what they start on it."""
    with Cluster.up(readable=cluster_readable_paths) as cluster:
        yield cluster
