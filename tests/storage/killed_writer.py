"""A process that writes a dataset, and is killed in the middle of its second slice; and who goes on with it."""

import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from nnsight_hpc.storage import ActivationDataset, DatasetWriter
from nnsight_hpc.wire.errors import Conflict

_WRITER = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from nnsight_hpc.storage import DatasetWriter
    path, rows = Path(sys.argv[1]), np.load(sys.argv[2])
    writer = DatasetWriter(path, queue_bytes=4096)
    for part in writer.pending():
        with writer.slice(part.number) as s:
            for at in range(part.start, part.stop, 64):
                if part.number == 1 and at >= part.start + 1280:  # one of two shards is full by now
                    print("stalled", flush=True)
                    time.sleep(600)
                s.write("x", at, rows[at:min(at + 64, part.stop)])
"""


def write_until_killed(path, rows):
    """Write rows as the capture `x` of a dataset; SIGKILL comes when one of two shards of slice 1 is full."""
    rows_file = path.with_suffix(".npy")
    np.save(rows_file, rows)
    command = [sys.executable, "-c", textwrap.dedent(_WRITER), path, rows_file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().strip() == "stalled"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def finish_killed(path, write_slice, data):
    """Write what `write_until_killed` has left; the dataset is refused until then, and its first slice stands."""
    with pytest.raises(Conflict, match="not complete"):
        ActivationDataset(path)
    writer = DatasetWriter(path)
    assert [part.number for part in writer.pending()] == [1, 2]
    for part in writer.pending():
        write_slice(writer, part.number, data)
    writer.finish()
