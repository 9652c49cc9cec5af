"""Requests on one model, one after the other: none sees what another has left, and none ends the worker by what is harmless."""

import pytest
import torch

from nnsight_hpc.execution.values import save_tensors, unpack_values
from nnsight_hpc.graph import GraphBuilder, Ref, TensorRef
from nnsight_hpc.models import Loaded
from nnsight_hpc.slurm.worker.control import Control
from nnsight_hpc.slurm.worker.loop import Runner
from nnsight_hpc.slurm.worker.model import Alone
from nnsight_hpc.wire.frames import pack
from nnsight_hpc.wire.messages import ModelIdentity
from nnsight_hpc.wire.workers import Lease
from tests.oracle.architectures import _LLAMA_LIKE, _causal

ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
}


@pytest.fixture(params=ROPES)
def runner(request):
    """The model's thread of a worker, here, on a small Llama whose position encoding depends on the prompt's length."""
    torch.manual_seed(0)
    settings = {"num_key_value_heads": 2, "max_position_embeddings": 64, "rope_parameters": ROPES[request.param]}
    module = _causal("Llama", **settings, **_LLAMA_LIKE).eval().requires_grad_(requires_grad=False)
    return Runner(Alone(Loaded(module, None, ModelIdentity(id="m"))), Control("w1"), None)


def _ask(runner, folder, tokens, *, cancelled=False, **kwargs):
    """The logits for a prompt of so many tokens."""
    builder = GraphBuilder()
    forward = builder.append("model.forward", (), {"input_ids": TensorRef("ids"), "use_cache": False, **kwargs}, None)
    save = builder.add("save", Ref(builder.add("model.output", Ref(forward), "lm_head")))
    graph = builder.build({"logits": save}, ModelIdentity(id="m"))
    (folder / "request").write_bytes(
        pack(graph.to_json().encode(), save_tensors({"ids": torch.arange(tokens)[None] % 97}))
    )
    lease = Lease("r1", "run", 1, str(folder / "request"), str(folder / "result"), "ada")
    if cancelled:
        runner._control._cancelled.add("r1")
    [[(_, outcome)]] = runner.run([lease], folder, lambda *_: None)
    runner._control.finished("r1")
    assert outcome.error is None
    return None if outcome.cancelled else unpack_values(outcome.result)["logits"]


def test_a_request_gives_the_same_before_and_after_others(runner, tmp_path):
    """Longer prompts and hidden states that others asked for change nothing, bit for bit, and the worker goes on."""
    first = _ask(runner, tmp_path, 80)
    _ask(runner, tmp_path, 200)
    _ask(runner, tmp_path, 5, output_hidden_states=True)
    assert torch.equal(first, _ask(runner, tmp_path, 80))
    assert runner._control.failure is None
    assert not any(part._forward_hooks for part in runner._model.loaded.module.modules())


def test_a_cancelled_request_gives_up_before_its_graph_is_run(runner, tmp_path):
    """A request that nobody waits for ends as cancelled, and the next one is served."""
    assert _ask(runner, tmp_path, 80, cancelled=True) is None
    assert _ask(runner, tmp_path, 80).shape[1] == 80


@pytest.mark.parametrize("budget", [None, 1])
def test_a_worker_warms_up_without_a_trace(runner, tmp_path, budget, caplog):
    """What a request takes has been built before the first one, which sees the model as it was; not enough memory only logs."""
    expected = _ask(runner, tmp_path, 80)
    warm = Runner(runner._model, runner._control, budget)
    warm.warm_up()
    assert ("could not warm up" in caplog.text) is (budget is not None)
    assert runner._control.failure is None
    assert torch.equal(expected, _ask(runner, tmp_path, 80))
