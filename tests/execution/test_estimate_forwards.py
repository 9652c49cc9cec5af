"""The memory of a model's own forward, backward and generation is estimated, not only that of the graph's operations."""

import pytest
import torch

from nnsight_hpc.execution.estimate import check_memory
from tests.execution.measured import peak_of
from tests.memory_programs import PROGRAMS, language_model, token_ids


@pytest.fixture(scope="module")
def model():
    return language_model(256, 2000, "cpu", torch.float32)


@pytest.fixture(scope="module")
def ids():
    return token_ids(8, 64, 2000, "cpu")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_estimate_is_near_the_measured_peak(model, ids, program):
    """Estimated and measured memory of a run differ by less than a factor of 1.5."""
    tracer = program(model, ids)  # what libraries keep from their first call on is not the request's
    peak = peak_of(lambda: program(model, ids))
    estimate = check_memory(tracer.graph, tracer.graph.tensors, model.module).estimate
    assert 1 / 1.5 < estimate / peak < 1.5
