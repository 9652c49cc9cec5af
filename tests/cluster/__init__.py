"""A real Slurm cluster on this machine, for tests and to try things by hand (``python -m tests.cluster``).

Slurm, munge, sshd and the users are real; hosts are sets of Linux namespaces. It needs root, and about five seconds.
`Cluster` is all that tests need; in pytest it is the fixture `cluster`.
"""

from .cluster import Cluster

__all__ = ["Cluster"]
