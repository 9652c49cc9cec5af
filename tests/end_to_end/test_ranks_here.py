"""Two ranks on this machine, without Slurm: the command line, a real daemon, a real mpirun, and a session of a researcher."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnsight_hpc import LanguageModel
from tests.local_account import local_account, outlasting

pytestmark = pytest.mark.slow

PROMPT = "the capital of the city is"
CLOSE = {"rtol": 0, "atol": 1e-5}
"""Sums over ranks are in another order than in one process; values are about 1."""


@pytest.fixture(scope="module")
def home():
    """An account of its own, whose daemon and workers are ended afterwards; none of their processes is left."""
    with local_account() as folder:
        yield folder
        nnsight("daemon", "stop", "--workers")


@pytest.fixture(scope="module")
def pool(home, tiny_llama):
    """A pool of one replica of two ranks that serves."""
    said = nnsight("up", "tiny", "--model", str(tiny_llama), "--tp", "2", "--wait")
    assert said.startswith("Pool tiny: ready")
    return "tiny"


def nnsight(*arguments):
    command = [sys.executable, "-m", "nnsight_hpc.client", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=200).stdout


def test_an_intervention_with_gradients_is_that_of_one_process(pool, tiny_llama):
    """A session sets neurons that lie on both ranks, and takes gradients of heads: as in one process, within rounding."""
    lm = LanguageModel(str(tiny_llama))

    def ask(**where):
        with lm.session(**where):
            with lm.trace(PROMPT):
                lm.model.layers[1].mlp.down_proj.input[:, -1, [3, 50]] = 1
                logits = lm.lm_head.output.save()
            with lm.trace(PROMPT):
                heads = lm.model.layers[0].self_attn.o_proj.input
                gradient = heads.grad.save()
                lm.lm_head.output[:, -1].log_softmax(-1)[0, 5].backward()
        return logits, gradient

    for there, here in zip(ask(remote=True, pool=pool), ask(), strict=True):
        torch.testing.assert_close(there, here, **CLOSE)


def test_an_error_names_the_users_line(pool, tiny_llama):
    """An operation that fails on all ranks is one error of its own type, and the pool goes on."""
    lm = LanguageModel(str(tiny_llama))
    with pytest.raises(IndexError, match="index 99 is out of bounds"), lm.trace(PROMPT, remote=True, pool=pool):
        lm.model.layers[1].self_attn.q_proj.output[:, 99].save()
    with lm.trace(PROMPT, remote=True, pool=pool):
        hidden = lm.model.layers[1].output.save()
    assert hidden.shape[-1] == 32


def test_down_ends_all(pool, home):
    """The ranks end in order, and the record says so."""
    [replica] = json.loads(nnsight("status", "--json"))["pools"][0]["replicas"]
    nnsight("down", pool, "--wait")
    assert json.loads((Path(replica["log"]).parent / "end.json").read_text())["cause"] == "DRAINED"
    assert outlasting(home, "mpirun") == []
