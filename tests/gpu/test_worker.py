"""A worker that holds its model on a GPU: where it puts it, what it refuses, and what it survives."""

import msgspec
import pytest
import torch

from nnsight_hpc.execution.values import unpack_values
from nnsight_hpc.graph import Ref, TensorRef
from nnsight_hpc.graph.build import FORWARD, READS, SAVE, GraphBuilder
from nnsight_hpc.graph.nodes import Seed
from nnsight_hpc.models import load
from nnsight_hpc.slurm.worker.warmup import first_forward, placement
from tests.slurm.worker import graphs
from tests.slurm.worker.graphs import IDS, capture_frame, operation_frame

GPU = torch.device("cuda", 0)
MiB = 1 << 20


def _answer(bench, frame):
    """The values of a request, or its error."""
    request = bench.daemon.submit(frame)
    outcome = bench.daemon.outcome(request, 120)
    return outcome.error or unpack_values(bench.daemon.result(request))


def _hidden(folder, dtype="auto"):
    """What a plain hook sees on the GPU at the point that `capture_frame` saves, on the CPU."""
    seen, model = [], load(str(folder), dtype=dtype).module.to(GPU)
    model.model.layers[1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=IDS.to(GPU), use_cache=False)
    return seen[0].cpu()


def test_weights_go_to_the_gpu(tiny_llama):
    """The worker loads onto the GPU, and runs a forward and an estimate there before it says that it is ready."""
    before = torch.cuda.memory_allocated(GPU)
    loaded = load(str(tiny_llama), **placement())
    first_forward(loaded)
    held = sum(p.numel() * p.element_size() for p in loaded.module.parameters())
    assert {p.device for p in loaded.module.parameters()} == {b.device for b in loaded.module.buffers()} == {GPU}
    assert held <= torch.cuda.memory_allocated(GPU) - before < held + 64 * MiB


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_results_equal_hooks_and_arrive_on_the_cpu(bench, tiny_llama, dtype):
    """In the dtype of the pool a saved value is bit for bit the hook's on this GPU; the client needs none."""
    bench.daemon.spec = bench.spec = msgspec.structs.replace(bench.spec, dtype=dtype)
    bench.ready_worker()
    values = _answer(bench, capture_frame())
    assert values["hidden"].device.type == "cpu"
    assert not values["hidden"].requires_grad
    assert torch.equal(values["hidden"], _hidden(tiny_llama, dtype))


def test_the_worker_computes_on_the_gpu(resident):
    """The value of a request says that it lies on the GPU while the request runs."""
    builder = GraphBuilder()
    forward = builder.append(FORWARD, (), {"input_ids": TensorRef("ids"), "use_cache": False}, None)
    hidden = Ref(builder.add(READS["output"], Ref(forward), "model.layers.1"))
    device = builder.add(SAVE, Ref(builder.add("attribute", hidden, "device")))
    values = _answer(resident, graphs._frame(builder, {"device": device}, {"ids": IDS}))
    assert values["device"] == GPU


def test_request_beyond_the_free_memory_is_refused(resident, tiny_llama):
    """The budget is what the GPU has free: 256 GiB are refused with the estimate."""
    error = _answer(resident, operation_frame("torch.zeros", [1 << 36]))
    assert error.kind == "InvalidGraph"
    assert "256 GiB of memory" in f"{error.what} {error.why}"
    assert torch.equal(_answer(resident, capture_frame())["hidden"], _hidden(tiny_llama))


def _indexed(index):
    """Reads a hidden state with an index."""
    builder = GraphBuilder()
    forward = builder.append(FORWARD, (), {"input_ids": TensorRef("ids"), "use_cache": False}, None)
    hidden = Ref(builder.add(READS["output"], Ref(forward), "model.layers.1"))
    save = builder.add(SAVE, Ref(builder.add("operator.getitem", hidden, index)))
    return builder, save


def _wrong(what):
    builder, save = _indexed((slice(None), 0))
    tensors = {"ids": IDS}
    if what == "a token that the model does not know":
        tensors = {"ids": IDS * 1000}
    elif what == "a list":
        builder, save = _indexed((slice(None), [0, 99]))
    elif what == "a constant":
        builder, save = _indexed((0, TensorRef("wrong")))
        tensors["wrong"] = torch.tensor([1, 99])
    elif what == "a constant of another operation":
        hidden = Ref(builder.add("operator.getitem", Ref(save), (0,)))
        save = builder.add(SAVE, Ref(builder.add("torch.gather", hidden, 0, TensorRef("wrong"))))
        tensors["wrong"] = torch.tensor([1, 99])
    else:
        seed = Seed(1)
        save = builder.add(SAVE, Ref(builder.add("torch.bernoulli", Ref(save), generator=seed)))
    return graphs._frame(builder, {"x": save}, tensors)


WRONG = (
    "a token that the model does not know",
    "a list",
    "a constant",
    "a constant of another operation",
    "a probability",
)


@pytest.mark.parametrize("what", WRONG)
def test_what_would_end_the_gpu_s_process_is_refused(resident, tiny_llama, what):
    """An index or a probability out of bounds is the request's error, as on the CPU, and the worker serves on."""
    worker = resident.processes[0].pid
    error = _answer(resident, _wrong(what))
    assert error.kind == "ExecutionFailed"
    assert error.exception in ("IndexError", "RuntimeError")
    assert "out of" in error.what or "between 0 and 1" in error.what
    assert torch.equal(_answer(resident, capture_frame())["hidden"], _hidden(tiny_llama))
    assert (worker, None) == (resident.processes[0].pid, resident.processes[0].poll())


def test_out_of_memory_leaves_the_worker_healthy(bench, tiny_llama):
    """A request that the GPU has no memory for fails alone; its memory is free again, and the next answer is the same."""
    bench.daemon.spec = bench.spec = msgspec.structs.replace(bench.spec, request_memory=1 << 50)
    worker = bench.ready_worker()
    before = _answer(bench, capture_frame())["hidden"]
    free, _ = torch.cuda.mem_get_info(GPU)
    for _ in range(3):
        error = _answer(bench, _half_of_the_gpu_twice())
        assert (error.kind, error.exception) == ("ExecutionFailed", "MemoryError")
        assert "not enough memory" in error.what
        assert torch.equal(_answer(bench, capture_frame())["hidden"], before)
    assert torch.equal(before, _hidden(tiny_llama))
    assert free - torch.cuda.mem_get_info(GPU)[0] < 256 * MiB
    assert worker.poll() is None


def _half_of_the_gpu_twice():
    """Takes memory for real, and then more than there is, in the middle of a forward."""
    _, total = torch.cuda.mem_get_info(GPU)
    builder = GraphBuilder()
    forward = builder.append(FORWARD, (), {"input_ids": TensorRef("ids"), "use_cache": False}, None)
    hidden = Ref(builder.add(READS["output"], Ref(forward), "model.layers.1"))
    size = [int(0.6 * total) // (4 * 5 * 32), 5, 32]
    one, two = (Ref(builder.add("Tensor.clone", Ref(builder.add("Tensor.expand", hidden, size)))) for _ in range(2))
    save = builder.add(SAVE, Ref(builder.add("Tensor.mean", Ref(builder.add("operator.add", one, two)))))
    return graphs._frame(builder, {"mean": save}, {"ids": IDS})
