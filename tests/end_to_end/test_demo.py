"""The demonstration as a user runs it, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from nnsight_hpc.client.demo import CAPTURES, CONTEXT
from nnsight_hpc.models import load
from nnsight_hpc.storage import ActivationDataset
from tests.models_for_tests import CACHE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory, smollm2):
    """A fresh user's home, with the model in the cache."""
    home = tmp_path_factory.mktemp("home")
    return {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(CACHE), "COLUMNS": "120"}


@pytest.fixture(scope="module")
def shown(environment):
    """The folder of one whole demonstration, and what it told a person; its result is JSON alone."""
    command = [sys.executable, "-m", "nnsight_hpc.client", "demo", "--out", "demo", "--json"]
    ended = subprocess.run(
        command, check=False, env=environment, cwd=environment["HOME"], capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    folder = Path(environment["HOME"]) / "demo"
    result = json.loads(ended.stdout)
    assert (result["folder"], "dump" in result["seconds"]) == (str(folder), True)
    return folder, ended.stderr


def _processes_of(folder):
    """Processes whose environment or command names the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            named = str(folder) in " ".join(process.cmdline()) or str(folder) in process.environ().get(
                "NNSIGHT_HPC_HOME", ""
            )
            if named and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process.pid, process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_model_knows_paris_and_the_neurons_change_it(shown):
    """Paris comes first before the intervention, and another token after it."""
    _, said = shown
    rows = [line.split("│") for line in said.splitlines() if line.startswith("│ '")]
    before, _, after = next([cell.strip() for cell in row[1:4]] for row in rows if len(row) == 6)
    assert before == "' Paris'"
    assert after != "' Paris'"
    assert "predicts ' Rome'" in said


def test_heat_map_is_a_picture(shown):
    """The heat map is a PNG of a sensible size."""
    folder, _ = shown
    data = (folder / "activation_patching.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert len(data) > 20_000


def test_dataset_is_what_plain_hooks_give(shown, smollm2):
    """Every row of the fetched dataset is what PyTorch hooks give for its document alone, to bfloat16's last bit or two.

    The dump computes in batches, so float32 sums differ in their last bits and some values round to the neighbour.
    """
    folder, _ = shown
    dataset = ActivationDataset(folder / "docstrings.zarr")
    documents = [json.loads(line) for line in (folder / "docstrings.jsonl").read_text("utf-8").splitlines()]
    assert dataset.documents == len(documents) >= 300
    loaded = load(str(smollm2))
    seen, same, count = {}, 0, 0
    for capture in CAPTURES:
        module = loaded.module.get_submodule(capture.removesuffix(".output"))
        module.register_forward_hook(lambda _m, _i, out, capture=capture: seen.update({capture: out}))
    for index in range(0, len(documents), 20):
        ids = loaded.tokenizer(documents[index]["text"])["input_ids"][:CONTEXT]
        with torch.no_grad():
            loaded.module(torch.tensor([ids]), use_cache=False)
        document = dataset.document(index)
        assert document.id == documents[index]["id"]
        assert document.input_ids.tolist() == ids
        for capture in CAPTURES:
            expected, got = seen[capture][0].to(torch.bfloat16), torch.tensor(document[capture].astype(np.float32))
            torch.testing.assert_close(got, expected.float(), rtol=2**-7, atol=2**-7)
            same, count = same + int((got == expected.float()).sum()), count + got.numel()
    assert same / count > 0.98


def test_nothing_runs_afterwards(shown):
    """Daemon and worker have ended, and the output says where everything lies."""
    folder, said = shown
    assert _processes_of(folder) == []
    assert "Nothing runs any more" in said
    assert str(folder) in said


def _interrupt(environment, moment, *, seconds=2):
    """Press Ctrl-C some seconds after a demonstration has printed `moment`; gives the rest of what it printed."""
    command = [sys.executable, "-u", "-m", "nnsight_hpc.client", "demo", "--out", "interrupted"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, cwd=environment["HOME"], start_new_session=True, **pipes)
    for line in process.stdout:
        if moment in line:
            break
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=200)
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    return rest


@pytest.mark.parametrize(
    "moment", ["Start the daemon", pytest.param("Predictions", marks=pytest.mark.long), "Dump the residual"]
)
def test_interrupt_leaves_no_process(environment, moment):
    """Ctrl-C at any moment ends the demonstration with 130, and everything that it had started."""
    _interrupt(environment, moment)
    assert _processes_of(Path(environment["HOME"]) / "interrupted") == []


def test_interrupt_of_the_conversion_leaves_nothing(environment, tmp_path):
    """Ctrl-C while the model is being converted leaves neither a process nor a part of the model."""
    _interrupt({**environment, "XDG_CACHE_HOME": str(tmp_path)}, "Prepare SmolLM2", seconds=8)
    assert _processes_of(str(tmp_path)) == []
    assert list((tmp_path / "nnsight-hpc" / "models").glob("*")) == []


def test_folder_of_somebody_else_is_not_touched(environment):
    """A folder that exists and holds other things is refused and left as it is."""
    folder = Path(environment["HOME"]) / "mine"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    command = [sys.executable, "-m", "nnsight_hpc.client", "demo", "--out", str(folder)]
    ended = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 5
    assert os.listdir(folder) == ["thesis.tex"]
