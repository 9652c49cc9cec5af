"""Which tests of the API run on how many ranks: a plugin that chooses, and says at the end what ran where.

Every test that takes a model from a fixture runs in one process, and again on ranks: on `ALL` ranks with every architecture
that can be split; on `SOME` numbers of ranks with one architecture each, chosen by the test's name, or with every one where
the test is marked `every_degree`. A test marked ``in_one_process("why")`` stays in this process.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.devices import DEVICE

if TYPE_CHECKING:
    from collections.abc import Iterable

ALL, SOME = (2,), (3, 4)


def _most_ranks() -> int:
    """How many ranks can run at most: as many as there are GPUs, or any number."""
    if DEVICE == "cpu":
        return max(SOME)
    import torch

    return torch.cuda.device_count()


DEGREES = tuple(ranks for ranks in (*ALL, *SOME) if ranks <= _most_ranks())
SPLIT = ("llama", "qwen3", "gemma2", "mixtral", "gpt_neox", "gpt2", "opt", "smollm2")
"""The architectures that are spread over ranks."""
_HERE = "tests/oracle/"
_ON_RANKS = re.compile(r"[\[-](\w+):(\d+)ranks[-\]]")

in_one_process = pytest.mark.in_one_process
"""Why a test makes no sense on ranks, or has nothing to do with them."""
every_degree = pytest.mark.every_degree
"""On each number of ranks with every architecture."""


class Place(NamedTuple):
    """Where a model is: its architecture, and over how many ranks it is spread (1: not at all, in this process)."""

    name: str
    ranks: int = 1

    def __str__(self) -> str:
        return self.name if self.ranks == 1 else f"{self.name}:{self.ranks}ranks"


def places(names: Iterable[str], degrees: Iterable[int] = DEGREES) -> list[object]:
    """What a fixture takes as its parameters: each model in one process, and those of `SPLIT` on ranks."""
    alone = [pytest.param(Place(name), id=name) for name in names]
    spread = [Place(name, ranks) for ranks in degrees for name in names if name in SPLIT]
    return alone + [pytest.param(place, id=str(place), marks=pytest.mark.ranks) for place in spread]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks: runs the model on MPI ranks; `make test-tp`")
    config.addinivalue_line("markers", "in_one_process(why): not on ranks")
    config.addinivalue_line("markers", "every_degree: on each number of ranks with every architecture")
    config.pluginmanager.register(Chosen(config), "tests-on-ranks")


def place_of(item: pytest.Item) -> Place | None:
    """Where the model of a test is; None for a test that takes no model."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return next((value for value in parameters if isinstance(value, Place)), None)


class Chosen:
    """Chooses, and keeps what was chosen: by test, why it stays in one process, or by number of ranks the architectures."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._alone: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        names = defaultdict(set)
        for item in items:
            if (place := place_of(item)) and place.ranks > 1:
                names[_variant(item)].add(place.name)
        chosen = [item for item in items if self._runs(item, sorted(names[_variant(item)]))]
        self._config.hook.pytest_deselected(items=[*set(items).difference(chosen)])
        items[:] = chosen
        self._note_those_in_one_process(items)

    def _runs(self, item: pytest.Item, names: list[str]) -> bool:
        place = place_of(item)
        if place is None or place.ranks == 1:
            return True
        if item.get_closest_marker("in_one_process"):
            return False
        if place.ranks in ALL or item.get_closest_marker("every_degree"):
            return True
        return names[(zlib.crc32(_variant(item).encode()) + place.ranks) % len(names)] == place.name

    def _note_those_in_one_process(self, items: list[pytest.Item]) -> None:
        for item in items:
            place, mark = place_of(item), item.get_closest_marker("in_one_process")
            if place and place.name not in SPLIT:
                self._alone[f"all tests with {place.name}"] = "an architecture that is not split"
            elif mark or (not place and item.nodeid.startswith(_HERE)):
                self._alone[_test(item.nodeid)] = mark.args[0] if mark else "it has a module of its own"

    def pytest_sessionfinish(self) -> None:
        if hasattr(self._config, "workeroutput"):
            self._config.workeroutput["alone"] = self._alone

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        self._alone |= node.workeroutput.get("alone", {})

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        reports = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, ())]
        ran = defaultdict(lambda: defaultdict(set))
        number = defaultdict(int)
        for report in reports:
            if report.when == "call" and (place := place_in(report.nodeid)):
                ran[_test(report.nodeid)][place.ranks].add(place.name)
                number[place.ranks] += 1
        if not ran:
            return
        terminalreporter.section("tests of the API on MPI ranks")
        for test, at in ran.items():
            where = "; ".join(f"{ranks}: {' '.join(sorted(names))}" for ranks, names in sorted(at.items()))
            terminalreporter.line(f"{test}  {where}")
        terminalreporter.section("in one process only", sep="-")
        for test, why in sorted(self._alone.items()):
            terminalreporter.line(f"{test}: {why}")
        terminalreporter.line(", ".join(f"{number[ranks]} tests on {ranks} ranks" for ranks in sorted(number)))


def _test(nodeid: str) -> str:
    return nodeid.partition("[")[0].removeprefix(_HERE)


def _variant(item: pytest.Item) -> str:
    """A test with its parameters but the model's."""
    return item.nodeid.replace(str(place_of(item)), "")


def place_in(nodeid: str) -> Place | None:
    """Where the model of a test is, if it is on ranks."""
    found = _ON_RANKS.search(nodeid)
    return Place(found[1], int(found[2])) if found else None
