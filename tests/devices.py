"""Where the tests of models run: on the CPU, or with ``NNSIGHT_HPC_TEST_DEVICE=cuda`` on a GPU (`make test-gpu`)."""

import os

DEVICE = os.environ.get("NNSIGHT_HPC_TEST_DEVICE", "cpu")
"""The name of a device, as torch takes it."""
