"""The package as users get it: the list of packages, a wheel in a fresh environment, lazy imports."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import nnsight_hpc
from nnsight_hpc.wire.dashboard import PAGE

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP = {
    "nnsight_hpc": "nnsight_hpc",
    **{f"nnsight_hpc.{n}": n for n in ("storage", "slurm", "daemon", "client", "examples")},
}


def _packages_in_folders():
    for package, folder in TOP.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            inner = init.parent.relative_to(ROOT / folder).parts
            yield ".".join((package, *inner))


def test_every_folder_with_code_is_a_listed_package():
    """The packages in pyproject.toml are exactly the folders."""
    assert sorted(SETTINGS["tool"]["setuptools"]["packages"]) == sorted(_packages_in_folders())


def test_mapping_leads_to_the_folders():
    """Each mapped package lies where the mapping says."""
    for package, folder in SETTINGS["tool"]["setuptools"]["package-dir"].items():
        assert (ROOT / folder / "__init__.py").exists(), package


def test_public_names():
    """The names at the top of nnsight_hpc are these and no others."""
    assert set(nnsight_hpc.__all__) == {
        *("Graph", "LanguageModel", "NNsight"),
        *("HpcError", "InvalidInput", "InvalidGraph", "NotFound", "Conflict", "Denied", "Unreachable", "Incompatible"),
        *("ReplicaFailed", "ExecutionFailed", "RequestCancelled", "CorruptData"),
    }
    assert all(getattr(nnsight_hpc, name) for name in nnsight_hpc.__all__)


@pytest.mark.parametrize("module", ["", ".wire.http", ".graph", ".storage", ".daemon", ".slurm.batch", ".client.cli"])
def test_light_parts_load_no_torch(module):
    """What runs on a login node or prints a status loads no torch."""
    code = f"import sys, nnsight_hpc{module}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def _interpreters():
    """The running interpreter, and newer ones at hand: on the PATH, or beside it as pyenv keeps them."""
    found = {f"3.{sys.version_info.minor}": sys.executable}
    for minor in range(11, 16):
        beside = sorted(Path(sys.base_prefix).parent.glob(f"3.{minor}.*/bin/python"))
        if program := shutil.which(f"python3.{minor}", path=os.defpath) or next(map(str, beside), None):
            found.setdefault(f"3.{minor}", program)
    return found


def _of_interpreters():
    """A case for each of `_interpreters`: the oldest and the newest always, those between them where there is time."""
    found = list(_interpreters().items())
    for name, program in found:
        marks = () if name in (found[0][0], found[-1][0]) else pytest.mark.long
        yield pytest.param(program, id=name, marks=marks)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of what git has, built from a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(["git", "-C", ROOT, "checkout-index", "-a", f"--prefix={folder}/source/"], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, folder / "source"]
    subprocess.run(build, check=True)
    [built] = folder.glob("nnsight_hpc-*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_has_the_dashboards_page(wheel):
    """Files that are no modules are in it, too."""
    assert {f"nnsight_hpc/daemon/{name}" for name in PAGE} <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
@pytest.mark.parametrize("python", [*_of_interpreters()])
def test_wheel_works_in_a_fresh_environment(wheel, python, tmp_path, tmp_path_factory):
    """The wheel, with its base dependencies only, answers and runs a daemon, on every Python at hand."""
    # Without a pip of its own, and bytecode of what it does not run: that would be most of the time.
    subprocess.run([python, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    program = tmp_path / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", program / "python"]
    subprocess.run([*pip, "install", "-q", "--no-compile", wheel], check=True)
    environment = {**os.environ, **dict.fromkeys(("NNSIGHT_HPC_HOME", "XDG_CONFIG_HOME"), str(tmp_path))}
    environment["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("r"))  # sockets have short paths

    def run(*command):
        options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
        return subprocess.run([program / command[0], *command[1:]], check=True, **options).stdout

    assert run("nnsight-hpc", "--version") == f"nnsight-hpc {nnsight_hpc.__version__}\n"
    assert "torch" not in subprocess.run([*pip, "list"], check=True, capture_output=True, text=True).stdout.split()
    run("nnsight-hpc", "daemon", "start")
    status = json.loads(run("nnsight-hpc", "status", "--json"))
    run("nnsight-hpc", "daemon", "stop")
    assert status["pools"] == []
    run("python", "-c", "import nnsight_hpc.storage; nnsight_hpc.storage.ActivationDataset")
    names = ("daemon", "client", "storage", "slurm")
    assert [path for name in names for path in (tmp_path / "venv").glob(f"lib/*/site-packages/{name}")] == []
