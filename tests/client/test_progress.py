"""What is shown while one waits: in a notebook a line that changes, in a log lines that say something new."""

from __future__ import annotations

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from nnsight_hpc.client import progress
from nnsight_hpc.client.progress import Progress, is_watched


@pytest.fixture
def notebook():
    """IPython as a kernel runs it."""
    shell = InteractiveShell.instance()
    shell.kernel = object()
    yield shell
    InteractiveShell.clear_instance()


def test_in_a_notebook_one_line_changes_in_place(notebook):
    """The cell has one output, which says where things stand, and nothing in the end."""
    with capture_output() as captured, Progress("request r-1") as shown:
        assert is_watched()
        shown.show("queued on smol: a worker loads", done=1, total=4)
        shown.show("running on smol")
    assert [output.data["text/plain"] for output in captured.outputs] == [
        "",
        "request r-1: 25% queued on smol: a worker loads",
        "request r-1: running on smol",
        "",
    ]
    identifiers = {output.transient["display_id"] for output in captured.outputs}
    assert len(identifiers) == 1
    assert [output.update for output in captured.outputs] == [False, True, True, True]


def test_nothing_is_shown_of_what_is_quick(capsys, monkeypatch):
    """Not before `after` seconds have gone by, and in a log not in the first second."""
    monkeypatch.setattr(progress.time, "monotonic", lambda: 1000.0)
    with Progress("pool smol", after=60) as shown:
        shown.show("loads")
    with Progress("pool smol") as shown:
        shown.show("loads")
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_lines_when_they_are_new(capsys, monkeypatch):
    """On stderr, each once."""
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    clock = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with Progress("pool smol") as shown:
        for words in ("loads", "loads", "ready"):
            shown.show(words)
    assert not is_watched()
    assert capsys.readouterr() == ("", "pool smol: loads\npool smol: ready\n")
