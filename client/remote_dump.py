"""A dump on a cluster as an object: watched as any request, and found where it lies."""

from __future__ import annotations

from pathlib import Path

from nnsight_hpc.client.kept import kept_connection
from nnsight_hpc.client.requests import RemoteRequest
from nnsight_hpc.storage import ActivationDataset
from nnsight_hpc.wire.dumps import DumpStatus
from nnsight_hpc.wire.errors import NotFound
from nnsight_hpc.wire.messages import DatasetStatus, decode


class RemoteDump(RemoteRequest):
    """A dump on a cluster; `result` is its summary."""

    def __init__(self, id: str, name: str, cluster: str | None = None) -> None:
        super().__init__(id, cluster)
        self.name = name

    def pause(self) -> DumpStatus:
        """Have it wait, after the batches that run, until `resume`; what is written stays.

        Raises `Conflict` once it has ended.
        """
        return self._told("pause")

    def resume(self) -> DumpStatus:
        """Have it go on where it was."""
        return self._told("resume")

    def _told(self, what: str) -> DumpStatus:
        with kept_connection(self.cluster) as daemon:
            return decode(daemon.call("POST", f"/v1/dumps/{self.name}/{what}"), DumpStatus)

    @property
    def path(self) -> Path:
        """Where the dataset lies, on the cluster."""
        with kept_connection(self.cluster) as daemon:
            return Path(daemon.get(f"/v1/datasets/{self.name}", DatasetStatus).path)

    def dataset(self) -> ActivationDataset:
        """The dataset, where its folder can be seen from this machine. Raises `NotFound` where it cannot."""
        path = self.path
        if not path.is_dir():
            raise NotFound(
                f"dataset {self.name} lies on the cluster",
                where=str(path),
                why="this machine does not see its folder",
                next=f"`nnsight-hpc fetch {self.name}` brings it here",
            )
        return ActivationDataset(path)
