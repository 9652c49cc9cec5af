from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cluster.furnishing import REPOSITORY, Furnishing, program_paths


def folder(path: Path, mode: int = 0o755) -> Path:
    path.mkdir()
    path.chmod(mode)
    return path


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A folder for the test; pytest's own, above it, are closed."""
    return folder(tmp_path / "top")


def furnished(top: Path, *paths: Path) -> Furnishing:
    """What a host does for `paths` whose own folder lies over the one above all of pytest's."""
    furnishing = Furnishing("host", empty=own_folder(top))
    furnishing.open_paths(paths)
    return furnishing


def own_folder(top: Path) -> dict[str, str]:
    return {str(top.parents[-2]): "1777"}


def test_what_everybody_reaches_stays_as_it_is() -> None:
    """Where no folder above a path is closed or covered, nothing is mounted for it."""
    furnishing = Furnishing("host")
    furnishing.open_paths([Path("/usr/bin")])
    assert Furnishing("host") == furnishing


def test_the_outermost_closed_folder_is_covered(tmp_path: Path) -> None:
    """Of several closed folders above a path one is covered, and the path is brought back, but nothing beside it."""
    outer = folder(tmp_path / "outer", 0o700)
    wanted = folder(folder(outer / "inner", 0o700) / "wanted")
    furnishing = Furnishing("host")
    furnishing.open_paths([wanted])
    (covered,) = furnishing.empty
    assert outer.is_relative_to(covered)  # pytest's own folder, above it, is closed, too
    assert [str(wanted)] == furnishing.keep


def test_a_path_below_a_covered_folder_comes_back(top: Path) -> None:
    """What lies in the machine's /tmp is there on hosts that have a /tmp of their own; what lies in it comes along."""
    wanted = folder(top / "wanted")
    inside = folder(wanted / "inside")
    assert Furnishing("host", own_folder(top), [str(wanted)]) == furnished(top, inside, wanted)


def test_a_closed_path_is_opened_itself(top: Path) -> None:
    """A checkout in a folder that is closed itself: what lies in it is brought into an open folder of its name."""
    wanted = folder(top / "wanted", 0o700)
    parts = [folder(wanted / "a"), folder(wanted / "b")]
    assert [str(part) for part in parts] == furnished(top, wanted).keep


def test_the_interpreter_behind_every_link_is_needed(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual environment's `python` may lead through links in other folders: each is among the needed paths."""
    real, middle, first = top / "python3.11", folder(top / "middle") / "python3", folder(top / "bin") / "python"
    real.touch()
    middle.symlink_to("../python3.11")
    first.symlink_to(middle)
    monkeypatch.setattr(sys, "executable", str(first))
    paths = program_paths()
    assert {middle, real, REPOSITORY, Path(sys.prefix), Path(sys.base_prefix)} <= paths
