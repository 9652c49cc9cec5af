"""The package as users get it: the list of packages, a wheel in a fresh environment, lazy imports."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nnsight_hpc

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


@pytest.mark.slow
def test_wheel_works_in_a_fresh_environment(tmp_path):
    """A built wheel, installed into a new environment with only its base dependencies, answers."""
    subprocess.run(["git", "-C", ROOT, "checkout-index", "-a", f"--prefix={tmp_path}/source/"], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "wheels", tmp_path / "source"]
    subprocess.run(build, check=True)
    [wheel] = (tmp_path / "wheels").glob("nnsight_hpc-*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    program = tmp_path / "venv" / "bin"
    subprocess.run([program / "pip", "install", "-q", "--disable-pip-version-check", wheel], check=True)
    said = subprocess.run(
        [program / "nnsight-hpc", "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert said == f"nnsight-hpc {nnsight_hpc.__version__}\n"
    listed = subprocess.run([program / "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "torch" not in listed.split()
    subprocess.run(
        [program / "python", "-c", "import nnsight_hpc.client.cli, nnsight_hpc.daemon, nnsight_hpc.storage"],
        cwd=tmp_path,
        check=True,
    )
    generic = [
        path.name
        for name in ("daemon", "client", "storage", "slurm")
        for path in (tmp_path / "venv").glob(f"lib/*/site-packages/{name}")
    ]
    assert generic == []
