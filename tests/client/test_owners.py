"""The whole way on this machine, for what an owner decides: a policy, and a module of their own, on real workers."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_model

from nnsight_hpc import LanguageModel, NNsight
from nnsight_hpc.client.session import connect
from nnsight_hpc.models import load
from nnsight_hpc.wire.errors import Conflict, Denied, HpcError, InvalidInput, NotFound
from nnsight_hpc.wire.frames import pack
from nnsight_hpc.wire.messages import DumpSpec, RequestStatus, encode
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.pools import Policy, PoolSpec, PoolStatus
from tests.client.remote import until_ready
from tests.local_account import local_account

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.wire.http import HttpClient

LAB = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x, *, scale=1.0, extra=()):
            hidden = torch.tanh(self.first(x)) * scale
            for one in extra:
                hidden = hidden + one["bias"]
            if hidden.sum() > 1e6:
                return hidden
            return {"out": self.last(hidden), "hidden": hidden}

    def net():
        return Net(), (torch.zeros(2, 6),)
"""
POLICY = Policy(read=("model.layers", "lm_head"), set=("model.layers.*.mlp",), parameters=False, result_bytes=20_000)
IDS = torch.tensor([[3, 4, 5, 6, 7]])
CLOSED, OWN = {"remote": True, "pool": "closed"}, {"remote": True, "pool": "own"}
TOO_MUCH = "returns more than its pool's policy allows"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A module of the owner's own, its weights in a file, its package found by workers only where they are told."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "their_lab.py").write_text(textwrap.dedent(LAB))
    sys.path.insert(0, str(folder))
    import their_lab

    sys.path.remove(str(folder))
    torch.manual_seed(1)
    module = their_lab.Net().eval().requires_grad_(requires_grad=False)
    save_model(module, str(folder / "net.safetensors"))
    return module, folder


@pytest.fixture(scope="module")
def daemon(tiny_llama, own) -> Iterator[HttpClient]:
    """An account with two pools that serve: a language model under a policy, and the owner's own module."""
    lab = own[1]
    with local_account(OMP_NUM_THREADS="1"):  # of the workers; otherwise threads of all tests fight for the cores
        daemon = connect("local")
        path = (f"export PYTHONPATH={lab}{os.pathsep}$PYTHONPATH",)
        weights = str(lab / "net.safetensors")
        _up(daemon, PoolSpec(name="closed", model=str(tiny_llama), policy=POLICY))
        _up(daemon, PoolSpec(name="own", model=weights, factory="their_lab:net", setup=path))
        until_ready(daemon, "closed")
        until_ready(daemon, "own")
        yield daemon
        daemon.call("POST", "/v1/stop?workers=1")
        daemon.close()


def _up(daemon: HttpClient, spec: PoolSpec) -> PoolStatus:
    return daemon.put(f"/v1/pools/{spec.name}", spec, PoolStatus)


@pytest.fixture(scope="module")
def llama(tiny_llama) -> LanguageModel:
    return LanguageModel(str(tiny_llama))


def _hooked(module, part, *args, **kwargs):
    """What a module within `module` returns, and what the whole returns, by plain hooks."""
    seen = []
    handle = part.register_forward_hook(lambda _m, _a, output: seen.append(output))
    try:
        result = module(*args, **kwargs)
    finally:
        handle.remove()
    return seen[0], result


def _requests(daemon: HttpClient) -> list[dict[str, Any]]:
    return json.loads(daemon.call("GET", "/v1/requests"))


def _home() -> Path:
    return Path(os.environ["NNSIGHT_HPC_HOME"])


# -- the policy ---------------------------------------------------------------------------------------------------------


def test_what_is_allowed_runs_as_without_a_policy(daemon, llama, tiny_llama):
    """Reads below an allowed module, changes of an allowed one: the values are those of plain hooks."""
    module = load(str(tiny_llama)).module
    handle = module.model.layers[0].mlp.register_forward_hook(lambda _m, _a, output: output * 0)
    expected, result = _hooked(module, module.model.layers[2], input_ids=IDS, use_cache=False)
    handle.remove()
    with llama.trace(IDS, **CLOSED):
        llama.model.layers[0].mlp.output[:] *= 0
        hidden = llama.model.layers[2].output.save()
        logits = llama.lm_head.output.save()
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(logits, result.logits)


def test_tokens_of_a_generation_are_given_where_the_whole_model_may_not_be_read(daemon, llama):
    """The model's answer is what a pool is for; its scores are the whole model's output."""
    with llama.generate(IDS, max_new_tokens=2, **CLOSED) as tracer:
        tokens = tracer.result.save()
    assert tokens.shape == (1, 7)
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, **CLOSED}
    with pytest.raises(Denied, match="reads the model's result"), llama.generate(IDS, **options) as tracer:
        tracer.result.save()


def test_a_refused_graph_shows_the_users_line_and_is_not_queued(daemon, llama):
    """Before anything is queued; nothing of the request stays behind."""
    before = len(_requests(daemon))
    with (
        pytest.raises(Denied, match=r"changes a value of model\.layers\.1 in place") as raised,
        llama.trace(IDS, **CLOSED),
    ):
        llama.model.layers[1].output[0] = 0  # the user's line
        llama.lm_head.output.save()
    assert "test_owners.py" in raised.value.where
    assert "# the user's line" in raised.value.where
    assert "allows model.layers, lm_head to be read, model.layers.*.mlp to be set, and no weights" in raised.value.why
    with (
        pytest.raises(Denied, match=r"reads the parameter lm_head\.weight"),
        llama.trace(IDS, **CLOSED),
    ):
        llama.lm_head.weight.sum().save()
    assert len(_requests(daemon)) == before
    known = {request["id"] for request in _requests(daemon)}
    assert {file.name.partition(".")[0] for file in _home().rglob("*.request")} <= known


def test_a_result_that_is_too_large_is_refused_before_it_is_written(daemon, llama):
    """The error has the sizes and the line of the largest value; nothing lies where the result would be."""
    with pytest.raises(Denied, match=TOO_MUCH) as raised, llama.trace(IDS.repeat(1, 50), **CLOSED):
        large = llama.model.layers[0].output.save()  # noqa: F841 - too large
        llama.lm_head.output[:, -1].save()
    assert "too large" in raised.value.where
    assert "large: 32000 bytes" in raised.value.why
    newest = _requests(daemon)[-1]["id"]
    assert [file.name for file in _home().rglob(f"{newest}*") if "result" in file.name] == []
    with llama.trace(IDS.repeat(1, 50), **CLOSED):
        mean = llama.model.layers[0].output.mean(1).save()
    assert mean.shape == (1, 32)


def test_what_a_request_says_counts_as_returned(daemon, llama, capsys):
    """Values cannot be had line by line beyond what a result may be."""
    with pytest.raises(Denied, match=TOO_MUCH) as raised, llama.trace(IDS, **CLOSED) as tracer:
        for layer in llama.model.layers:
            for _ in range(10):
                tracer.log(layer.output.tolist())  # the user's line
    assert "the user's line" in raised.value.where
    assert len(capsys.readouterr().out) <= POLICY.result_bytes + 1000


def _dump(daemon, pool, name, captures, texts):
    request = new_request_id()
    lines = "\n".join(json.dumps({"id": str(n), "text": text}) for n, text in enumerate(texts))
    frame = pack(encode(DumpSpec(name=name, captures=captures)), lines.encode())
    daemon.put(f"/v1/datasets/{name}?pool={pool}&request={request}", frame, RequestStatus)
    status = daemon.get(f"/v1/requests/{request}", RequestStatus)
    while not status.state.ended:
        status = daemon.get(f"/v1/requests/{request}?wait=5&seen={status.state}", RequestStatus)
    return status


def test_dumps_are_held_against_the_policy_too(daemon):
    """Captures that may not be read are refused at once, too many bytes before the dataset is made; others are written."""
    with pytest.raises(Denied, match=r"the dump reads model\.embed_tokens\.output"):
        _dump(daemon, "closed", "one", ("model.embed_tokens.output",), ["one two"])
    failed = _dump(daemon, "closed", "two", ("model.layers.*.output",), ["one two three four five"] * 20)
    assert (failed.state, failed.error.kind) == ("FAILED", "Denied")
    assert "would return 38400 bytes" in failed.error.why
    with pytest.raises(NotFound):
        daemon.call("GET", "/v1/datasets/two/files")
    assert _dump(daemon, "closed", "three", ("model.layers.*.output",), ["one two"]).state == "COMPLETED"


def test_another_policy_counts_at_once_and_restarts_nothing(daemon, llama, tiny_llama):
    """What the owner changes holds for the next request, on the replica that is there."""
    replica = daemon.get("/v1/pools/closed", PoolStatus).replicas[-1].id
    _up(daemon, PoolSpec(name="closed", model=str(tiny_llama), policy=Policy(read=("lm_head",), result_bytes=100)))
    try:
        with pytest.raises(Denied), llama.trace(IDS, **CLOSED):
            llama.model.layers[0].output.sum().save()
        with pytest.raises(Denied, match="allows: 100 bytes"), llama.trace(IDS, **CLOSED):
            llama.lm_head.output.save()
    finally:
        _up(daemon, PoolSpec(name="closed", model=str(tiny_llama), policy=POLICY))
    with llama.trace(IDS, **CLOSED):
        llama.model.layers[0].output.sum().save()
    assert daemon.get("/v1/pools/closed", PoolStatus).replicas[-1].id == replica


# -- a module of the owner's own ----------------------------------------------------------------------------------------

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def test_a_module_is_traced_on_the_pool_that_has_its_weights(daemon, own):
    """Without a name the pool is found by the weights; reads, changes, gradients and parameters are those of plain hooks."""
    module = own[0]
    model = NNsight(module)
    seen, result = _hooked(module, module.first, X)
    with model.trace(X, remote=True) as tracer:
        first = model.first.output.save()
        out = tracer.result["out"].save()
        weight = model.last.weight.save()
        inside = model.source.torch_tanh_0.output.save()
    torch.testing.assert_close(first, seen)
    torch.testing.assert_close(out, result["out"])
    torch.testing.assert_close(inside, torch.tanh(seen))
    assert torch.equal(weight, module.last.weight)
    with model.trace(X, remote=True):
        model.first.output[:, 0] = 1
        hidden = model.last.input
        hidden.grad.save()
        changed = model.last.output.save()
        gradient = hidden.grad.save()
        changed.sum().backward()
    with torch.no_grad():
        new = seen.clone()
        new[:, 0] = 1
        torch.testing.assert_close(changed, module.last(torch.tanh(new)))
    torch.testing.assert_close(gradient, module.last.weight.sum(0).expand(3, -1))


def test_any_arguments_are_taken(daemon, own):
    """Keywords, numbers, lists of dicts of tensors reach the module's forward as they were given."""
    module = own[0]
    model = NNsight(module)
    extra = [{"bias": torch.ones(5)}, {"bias": torch.arange(5.0)}]
    with model.trace(X, scale=2.5, extra=extra, **OWN) as tracer:
        out = tracer.result["out"].save()
    torch.testing.assert_close(out, module(X, scale=2.5, extra=extra)["out"])


def test_invokes_and_sessions_run_on_it(daemon, own):
    """Invokes see their own rows, a later trace uses an earlier one's value, as in this process."""
    module, more = own[0], torch.cat([X, X[:1], -X])
    model = NNsight(module)
    with model.trace(remote=True) as tracer:
        with tracer.invoke(X):
            model.first.output[:] = 0
            one = model.last.output.save()
        with tracer.invoke(more):
            two = model.last.output.save()
    torch.testing.assert_close(one, module.last(torch.zeros(3, 5)))
    torch.testing.assert_close(two, module(more)["out"])
    with model.session(remote=True):
        with model.trace(X):
            hidden = model.first.output
        with model.trace(torch.zeros_like(X)):
            model.first.output = hidden
            patched = model.last.output.save()
    torch.testing.assert_close(patched, module(X)["out"])


def test_other_weights_are_refused_and_weights_elsewhere_are_not_needed(daemon, own):
    """Other weights are not those of this pool; a module on the meta device stands for them, where the pool is named."""
    other = NNsight(type(own[0])())
    with pytest.raises(NotFound, match="no pool serves the model Net"), other.trace(X, remote=True) as tracer:
        tracer.result["out"].save()
    with pytest.raises(Conflict, match="holds another model") as raised, other.trace(X, **OWN) as tracer:
        tracer.result["out"].save()
    assert raised.value.why.count("tensors-") == 2
    with torch.device("meta"):
        model = NNsight(type(own[0])())
    with model.trace(X, **OWN) as tracer:
        out = tracer.result["out"].save()
    torch.testing.assert_close(out, own[0](X)["out"])


def test_what_makes_no_sense_there_says_so(daemon, own, llama):
    """Prompts, generations, tokenizers and dumps of texts are refused in words."""
    with pytest.raises(InvalidInput, match="no language model"):
        LanguageModel.from_pool("own")
    with pytest.raises(InvalidInput, match="generates nothing"):
        NNsight(own[0]).generate(X, **OWN)
    with pytest.raises(InvalidInput, match="cannot write datasets of texts"):
        _dump(daemon, "own", "four", ("first.output",), ["one"])
    with pytest.raises(HpcError, match=r"no module|unexpected keyword"), llama.trace(IDS, **OWN):
        llama.lm_head.output.save()
