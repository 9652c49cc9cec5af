"""What every test gets: the fixture `cluster`, and the check that nothing is left on the machine afterwards."""

import os
import signal

from hypothesis import settings

from tests.devices import DEVICE

# The tensors of tests are tiny: on them a second thread costs several times what it saves. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if DEVICE == "cpu":  # on a machine with a GPU, workers that tests start would put their models there
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# A shell lets what it runs in the background ignore Ctrl-C, which the programs that tests start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No example fails for the time that it took: the machine may have been busy with something else. The gate has the same examples
# each time, so that what fails is what was changed; `make test-long` looks for others.
settings.register_profile("search", deadline=None)
settings.register_profile("gate", deadline=None, derandomize=True)
settings.load_profile("gate")

pytest_plugins = ["tests.cluster.plugin", "tests.models_for_tests", "tests.oracle.degrees", "tests.side_by_side"]
