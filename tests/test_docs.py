"""The documentation says what is so: links lead somewhere, snippets run, generated pages are up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")
_PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
_COMMAND = re.compile(r"^\$ (?:\.venv/bin/)?nnsight-hpc ((?:[a-z]+)(?: [a-z]+)?)(.*)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    """Every relative link and picture of a page is a file."""
    for target, _ in _LINK.findall(page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    """Mkdocs builds the documentation in strict mode."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "nnsight-hpc" in (tmp_path / "site" / "reference" / "cli" / "index.html").read_text("utf-8")


def test_list_of_operations_is_up_to_date():
    """The page of allowed operations is what the tool makes of the list."""
    subprocess.run([sys.executable, ROOT / "tools" / "operations-page", "--check"], check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_in_console_blocks_exist(page):
    """Every option that a page shows for a command is in the command's help."""
    import click
    from click.testing import CliRunner

    from nnsight_hpc.client.cli import program

    for words, rest in _COMMAND.findall(page.read_text("utf-8").replace("\\\n", " ")):
        first, *second = words.split()
        command = program.get_command(click.Context(program), first)
        path = [first, *second] if isinstance(command, click.Group) else [first]
        shown = CliRunner().invoke(program, [*path, "--help"]).output
        for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
            assert option in shown, (words, option)


@pytest.mark.slow
def test_snippets_of_the_first_experiment_run(smollm2):
    """The Python blocks of the guide run in order, here instead of on a pool."""
    namespace = {}
    for block in _PYTHON.findall((ROOT / "docs" / "guides" / "first-experiment.md").read_text("utf-8")):
        code = block.replace("remote=True", "remote=False")
        code = code.replace("~/.cache/nnsight-hpc/models/SmolLM2-135M-Instruct", str(smollm2))
        exec(compile(code, "first-experiment.md", "exec"), namespace)
    assert tuple(namespace["hidden"].shape) == (1, 9, 576)
    assert tuple(namespace["logits"].shape) == (1, 49152)
