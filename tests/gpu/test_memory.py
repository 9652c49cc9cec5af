"""The memory of a GPU: estimated before a run, refused beyond what is free, and given back after a run that had too little."""

import pytest
import torch
from torch import nn

from nnsight_hpc import NNsight
from nnsight_hpc.execution.estimate import check_memory
from nnsight_hpc.execution.estimate_budget import memory_budget
from nnsight_hpc.wire.errors import HpcError, InvalidGraph
from tests.memory_programs import PROGRAMS, language_model, token_ids
from tests.oracle.hooks import hooks_of

GPU = torch.device("cuda", 0)
MiB = 1 << 20


@pytest.fixture(scope="module")
def wide():
    """A Llama of width 1,024 with 16,000 tokens, in bfloat16."""
    return language_model(1024, 16_000, GPU, torch.bfloat16)


@pytest.fixture(scope="module")
def ids():
    return token_ids(8, 512, 16_000, GPU)


def _peak(program, model, ids):
    """Bytes that torch's allocator gave out at most while the program ran, beside the model's, and the program's graph."""
    program(model, ids)  # what libraries keep from their first call on is not the request's
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)
    tracer = program(model, ids)
    return torch.cuda.max_memory_allocated(GPU) - before, tracer.graph


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_estimate_is_near_the_allocator_s_peak(wide, ids, program):
    """Estimated and measured memory of a run differ by less than a factor of 1.5."""
    peak, graph = _peak(program, wide, ids)
    estimate = check_memory(graph, graph.tensors, wide.module).estimate
    print(
        f"{program.__name__}: estimate {estimate / MiB:.1f} MiB, peak {peak / MiB:.1f} MiB, ratio {estimate / peak:.2f}"
    )
    assert 1 / 1.5 < estimate / peak < 1.5


def test_budget_is_a_share_of_what_is_free():
    """What others and we ourselves hold on the GPU is not in the budget; what torch keeps for later is."""
    torch.cuda.empty_cache()
    before = memory_budget(GPU)
    held = torch.zeros(1 << 30, dtype=torch.uint8, device=GPU)
    during = memory_budget(GPU)
    del held
    after = memory_budget(GPU)
    free, total = torch.cuda.mem_get_info(GPU)
    assert 0.7 * total < before < free + (2 << 30)
    assert before - during == pytest.approx(0.8 * (1 << 30), rel=0.05)
    assert after == pytest.approx(before, rel=0.01)


def test_request_beyond_the_budget_is_refused(wide, ids):
    """A graph that wants more than the GPU has is refused with the estimate, and nothing is allocated for it."""
    with wide.trace(ids) as tracer:
        hidden = wide.model.layers[1].output
        if hidden.float().sum() < -1e30:  # never here; the check counts both ways
            hidden.new_zeros(1024, 10**8).sum().save()
    graph = tracer.graph
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    with pytest.raises(
        InvalidGraph, match=r"would bring the graph to about 19\d GiB of memory; the budget is [\d.]+ GiB"
    ):
        check_memory(graph, graph.tensors, wide.module)
    assert torch.cuda.max_memory_allocated(GPU) - before < MiB


def _in_an_operation(model, ids):
    with model.trace(ids):
        hidden = model.model.layers[3].output
        hidden.new_zeros(1024, 10**9).sum().save()
        model.lm_head.output.save()


def _in_the_model(model, ids):
    with model.trace(ids):
        model.model.layers[3].output = model.model.layers[3].output.repeat(4096, 1, 1)
        model.lm_head.output.save()


def _in_the_backward(model, ids):
    with model.trace(ids):
        hidden = model.model.layers[3].output
        with model.lm_head.output.float().sum().backward():
            hidden.grad.expand(100_000, -1, -1, -1).clone().save()


@pytest.mark.parametrize("program", [_in_an_operation, _in_the_model, _in_the_backward])
def test_out_of_memory_leaves_everything_as_it_was(wide, ids, program):
    """The error is torch's own; no hook and no memory stays, and the next answer is bit for bit the one before."""

    def answer():
        with wide.trace(ids):
            found = wide.lm_head.output[:, -1].save()
        return found  # noqa: RET504 - it is bound when the block ends

    expected = answer()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(GPU)
    with pytest.raises(HpcError) as caught:
        program(wide, ids)
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert hooks_of(wide.module) == []
    del caught
    assert torch.cuda.memory_allocated(GPU) - before < MiB
    assert torch.equal(answer(), expected)


def test_values_are_freed_after_their_last_use():
    """A chain of a hundred operations holds a few values at a time, not a hundred."""
    model, x = NNsight(nn.Sequential(nn.Tanh())), torch.randn(4 * MiB, device=GPU)
    size = 4 * x.numel()
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    with model.trace(x):
        value = model[0].output
        for _ in range(100):
            value = torch.cos(value) + 1
        value = value.sum().save()
    assert size < torch.cuda.max_memory_allocated(GPU) - before <= 6 * size
