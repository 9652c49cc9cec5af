"""What only a GPU shows. `make test-gpu` runs it; elsewhere nothing of it is collected, so nothing is skipped in silence."""

import pytest

from tests.devices import DEVICE
from tests.oracle.conftest import any_model, llama
from tests.slurm.worker.conftest import bench, resident

__all__ = ["any_model", "bench", "llama", "resident"]
collect_ignore_glob = [] if DEVICE == "cuda" else ["test_*.py"]


def pytest_configure():
    if DEVICE == "cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.exit("SKIPPED, nothing was tested: torch sees no CUDA GPU", pytest.ExitCode.NO_TESTS_COLLECTED)


@pytest.fixture
def inputs(llama):
    """Two prompts on the GPU."""
    return llama.inputs()
