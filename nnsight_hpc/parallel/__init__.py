"""Tensor parallelism over MPI: the world of ranks, its process group, agreement among ranks. Importing it joins nothing."""

from nnsight_hpc.parallel.checks import check_equal
from nnsight_hpc.parallel.group import form_group
from nnsight_hpc.parallel.guard import Guard, PeerFailed, Stop
from nnsight_hpc.parallel.lockstep import Lockstep
from nnsight_hpc.parallel.watchdog import Watchdog
from nnsight_hpc.parallel.words import Word
from nnsight_hpc.parallel.world import World, join

__all__ = ["Guard", "Lockstep", "PeerFailed", "Stop", "Watchdog", "Word", "World", "check_equal", "form_group", "join"]
