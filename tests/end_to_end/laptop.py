"""The laptop of the test cluster, as a researcher uses it."""

import subprocess
import sys


class Laptop:
    """The command line and Python on the host `laptop`, which reaches the cluster by SSH only; or on another machine."""

    def __init__(self, cluster, host="laptop", home=None):
        self.cluster, self._host, self.home = cluster, host, home or cluster.laptop_home
        self._place = {"env": {"HOME": str(self.home)}, "cwd": self.home}

    def run(self, *argv, check=True, timeout=180):
        return self.cluster.run(self._host, argv, **self._place, check=check, timeout=timeout)

    def popen(self, *argv):
        """Start a program, whose standard error can be read."""
        return self.cluster.popen(self._host, argv, **self._place, stderr=subprocess.PIPE, text=True)

    def nnsight(self, *arguments, **options):
        return self.run(sys.executable, "-m", "nnsight_hpc.client", *arguments, **options)
