"""pytest-xdist (`-n 2`): a file's tests run in one worker, and all files that use the test cluster in the same one.

So a module's fixtures are made once, and there is one test cluster. Files are handed out in the order in which they are
collected: what waits for programs (client, cluster, daemon, end to end) before what computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

_ON_THE_CLUSTER = ("tests/cluster/", "tests/client/test_cluster", "tests/end_to_end/test_cluster", "tests/slurm/batch/")


def _group(nodeid: str) -> str:
    """What runs in one worker with the test."""
    file = nodeid.partition("::")[0]
    return "cluster" if file.startswith(_ON_THE_CLUSTER) else file


@pytest.hookimpl(trylast=True)  # after the test cluster's plugin has marked them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    stray = {item.path for item in items if item.get_closest_marker("cluster") and _group(item.nodeid) != "cluster"}
    if stray:
        raise pytest.UsageError(f"{__name__}: the test cluster is used in {', '.join(map(str, sorted(stray)))}, too")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False
    return Files(config, log)
