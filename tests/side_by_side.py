"""pytest-xdist (`-n 2`): a file's tests run in one worker, and so do all tests on one number of ranks.

So a module's fixtures are made once, and there is one replica for each number of ranks; a worker that is given a file that
uses the test cluster has a cluster of its own. Files are handed out in the order in which they are collected: what waits for
programs (client, cluster, daemon, end to end) before what computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.oracle.degrees import place_in

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling


def _group(nodeid: str) -> str:
    """What runs in one worker with the test."""
    place = place_in(nodeid)
    return nodeid.partition("::")[0] if place is None else f"{place.ranks} ranks"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False
    return Files(config, log)
