"""Workers whose model is a module of the pool owner's own: real processes, and the stand-in daemon."""

from __future__ import annotations

import sys
import textwrap

import msgspec
import pytest
import torch
from safetensors.torch import save_model

from nnsight_hpc.execution.values import save_tensors, unpack_values
from nnsight_hpc.graph import GraphBuilder, Ref, TensorRef
from nnsight_hpc.models import wrap
from nnsight_hpc.models.factory import identify_weights
from nnsight_hpc.slurm.worker.control import Control
from nnsight_hpc.slurm.worker.loading import load_model
from nnsight_hpc.slurm.worker.warmup import example_forward
from nnsight_hpc.wire.errors import InvalidInput, ReplicaFailed
from nnsight_hpc.wire.frames import pack
from nnsight_hpc.wire.messages import ModelIdentity
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import EndCause
from tests.slurm.worker.stand_in import wait_for

LAB = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=3):
            super().__init__()
            self.first, self.last = nn.Linear(width, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(torch.relu(self.first(x)))

    def net():
        return Net()

    def broken():
        raise RuntimeError("the owner's own words")
"""


@pytest.fixture
def lab(bench, tmp_path, monkeypatch):
    """The bench with a pool of the owner's module, whose package the workers find."""
    (tmp_path / "labs_made.py").write_text(textwrap.dedent(LAB))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sys.path.insert(0, str(tmp_path))
    import labs_made

    sys.path.remove(str(tmp_path))
    sys.modules.pop("labs_made")
    torch.manual_seed(0)
    module = labs_made.Net().eval()
    save_model(module, str(tmp_path / "net.safetensors"))
    bench.spec = msgspec.structs.replace(
        bench.spec, name="own", model=str(tmp_path / "net.safetensors"), factory="labs_made:net"
    )
    bench.daemon.spec = bench.spec
    return bench, module


def test_a_graph_runs_on_the_owners_module(lab):
    """Loaded, identified by its weights, and as exact as the module itself; progress is in bytes of the file."""
    bench, module = lab
    bench.ready_worker()
    x = torch.randn(5, 3)
    builder = GraphBuilder()
    forward = Ref(builder.add("model.forward", TensorRef("x")))
    out = builder.add("save", Ref(builder.add("model.output", forward, "")))
    graph = builder.build({"out": out}, ModelIdentity(id="Net"))
    request = bench.daemon.submit(pack(graph.to_json().encode(), save_tensors({"x": x})))
    assert bench.daemon.outcome(request).error is None
    assert torch.equal(unpack_values(bench.daemon.result(request))["out"], module(x))
    report = bench.daemon.reports[-1]
    assert report.model == identify_weights(bench.spec.model)
    assert report.free > 0
    assert "no forward was tried" in bench.log()


def test_what_the_owners_code_does_wrong_is_in_the_end_of_the_worker(lab):
    """A factory that fails ends the worker with the owner's own error, its last lines included."""
    bench, _ = lab
    bench.spec = bench.daemon.spec = msgspec.structs.replace(bench.spec, factory="labs_made:broken")
    process = bench.worker()
    wait_for(lambda: process.poll() is not None, "the worker's end", 120)
    record = bench.end_record()
    assert (process.returncode, record.cause) == (1, EndCause.CRASHED)
    assert 'raise RuntimeError("the owner\'s own words")' in record.detail


def test_a_module_that_cannot_run_on_its_own_example_is_not_served():
    """The example is run before a replica is ready; what the module says against it is the reason of its end."""
    loaded = wrap(torch.nn.Linear(3, 4))
    example_forward(loaded, ((torch.zeros(2, 3),), {}))
    example_forward(loaded, ((), {"input": torch.zeros(2, 3)}))
    with pytest.raises(ReplicaFailed, match="first forward failed") as raised:
        example_forward(loaded, ((torch.zeros(2, 5),), {}))
    assert "2x5" in raised.value.why


def test_weights_in_a_folder_are_kept_on_the_node(lab, tmp_path, monkeypatch):
    """With a node's own disk the module is loaded from the copy there, and keeps its name and fingerprint."""
    bench, module = lab
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "weights"
    folder.mkdir()
    save_model(module, str(folder / "net.safetensors"))
    spec = msgspec.structs.replace(bench.spec, model=str(folder), node_cache=str(tmp_path / "disk"))
    loaded = load_model(spec, Control("w1"), bench.places, team=None).loaded
    x = torch.randn(2, 3)
    assert torch.equal(loaded.module(x), module(x))
    assert loaded.identity == identify_weights(str(folder))
    assert [file.name for file in (tmp_path / "disk").rglob("*.safetensors")] == ["net.safetensors"]


def test_several_ranks_are_refused_in_words(tmp_path):
    """A module of the owner's own is held by one rank; whoever starts more is told so before anything is loaded."""
    spec = PoolSpec(name="own", model="/nowhere.safetensors", factory="lab:net", tp=2)
    with pytest.raises(InvalidInput, match="held by one rank"):
        load_model(spec, Control("w1"), places_at(tmp_path), team=object())
