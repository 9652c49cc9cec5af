"""What is refused before anything is queued, and what is named in its place; sinfo's answers are recorded ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nnsight_hpc.slurm.batch.fits import check_fits
from nnsight_hpc.slurm.batch.nodes import list_nodes
from nnsight_hpc.slurm.batch.slurm import SlurmExecutor
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.pools import PoolSpec

if TYPE_CHECKING:
    from .conftest import Recorded

SINFO = [
    ("cpu*", "2-00:00:00", "1-infinite", "100", "64", "256000", "(null)", "icelake,ib"),
    ("gpu", "1-00:00:00", "1-4", "6", "32", "512000", "gpu:a100:4(S:0-1),nvme:1", "ib,nvlink"),
    ("gpu", "1-00:00:00", "1-4", "2", "96", "1024000", "gpu:h100:8(S:0-7)", "ib,nvlink"),
    ("debug", "30:00", "1-infinite", "1", "8", "16000", "gpu:1", "(null)"),
    ("long", "infinite", "1-infinite", "2", "32", "512000", "gpu:a100:2,gpu:v100:2,lustre:no_consume:4G", "(null)"),
]


@pytest.fixture
def site(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    recorded.program("sinfo", "".join("\x1f".join(row) + "\n" for row in SINFO))
    return recorded


def check(**options: object) -> None:
    check_fits(PoolSpec(**{"name": "big", "model": "none", **options}), list_nodes())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nodes": 100, "tp": 100, "time": "2-0"},
        {"partition": "gpu", "gpus_per_node": 8, "nodes": 2, "tp": 16, "mem": "1000G", "cpus_per_task": 12},
        {"partition": "gpu", "gres": "gpu:a100:4,nvme:1", "nodes": 4, "tp": 16},
        {"partition": "gpu", "gres": "gres:gpu=4"},
        {"partition": "gpu", "gres": "gpu"},
        {"partition": "gpu", "gres": "gpu:h100"},
        {"partition": "long", "gres": "gpu:v100:2,lustre:4096M"},
        {"partition": "long", "gpus_per_node": 4, "time": "30-0"},
        {"partition": "debug,gpu", "gpus_per_node": 4},
        {"partition": "debug", "time": "0:30:00", "mem": "0"},
        {"partition": "gpu", "constraint": "[ib*2&nvlink*1]|icelake"},
        {"partition": "debug", "time": "7-0", "qos": "long"},
    ],
)
def test_what_could_run_is_not_refused(site: Recorded, options: dict[str, object]) -> None:
    """On the partition that is named, one of several, or Slurm's default; a QOS may lift a partition's limits."""
    check(**options)


@pytest.mark.parametrize(
    ("options", "why", "allowed"),
    [
        ({"partition": "nope"}, "there is no partition nope", "use one of cpu, debug, gpu, long"),
        ({"partition": "gpu,nope"}, "there is no partition nope", "use one of cpu, debug, gpu, long"),
        ({"time": "3-0"}, "asks for a time of 3-0, partition cpu has at most 2-00:00:00", "use partition long"),
        ({"partition": "debug", "time": "31"}, "partition debug has at most 30:00", "use partition cpu or gpu or long"),
        (
            {"partition": "gpu", "nodes": 5, "tp": 5},
            "asks for 5 nodes, partition gpu has at most 4 a job",
            "use partition cpu",
        ),
        ({"partition": "long", "nodes": 3, "tp": 3}, "asks for 3 nodes, partition long has 2 nodes", "cpu or gpu"),
        ({"gpus_per_node": 1}, "asks for 1 gpu on 1 node, partition cpu has none", "use partition gpu or long"),
        (
            {"partition": "gpu", "gpus_per_node": 8, "nodes": 3, "tp": 3},
            "asks for 8 gpu on each of 3 nodes, partition gpu has 4 gpu:a100, 1 nvme (6 nodes) or 8 gpu:h100 (2 nodes)",
            "ask for what there is",
        ),
        ({"partition": "gpu", "gres": "gpu:b200:1"}, "1 gpu:b200 on 1 node, partition gpu has 4 gpu:a100", ""),
        ({"partition": "long", "gres": "lustre:5G"}, "5368709120 lustre on 1 node", "ask for what there is"),
        ({"partition": "gpu", "gres": "gpu:a100:8"}, "8 gpu:a100 on 1 node", "ask for what there is"),
        ({"tp": 2, "cpus_per_task": 33}, "66 CPUs on 1 node, partition cpu has 64", "use partition gpu"),
        ({"partition": "debug", "time": "5", "mem": "64G"}, "64G of memory on 1 node, partition debug has 16000M", ""),
        (
            {"partition": "gpu", "gpus_per_node": 4, "mem": "900G", "nodes": 3, "tp": 3},
            "900G of memory on each of 3 nod",
            "",
        ),
        ({"constraint": "ib&volta"}, "no node has the feature volta", "use of ib, icelake, nvlink"),
    ],
)
def test_what_could_never_run_is_refused(site: Recorded, options: dict[str, object], why: str, allowed: str) -> None:
    """With what was asked for, what there is, and which other partitions could run it."""
    with pytest.raises(InvalidInput) as caught:
        check(**options)
    assert why in str(caught.value)
    assert allowed in caught.value.next


def test_a_cluster_without_a_default_partition_wants_one(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user's own environment names one, which sbatch then takes."""
    recorded.program("sinfo", "".join("\x1f".join(row) + "\n" for row in SINFO[1:]))
    with pytest.raises(InvalidInput, match="no default partition"):
        check()
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    check(gpus_per_node=8)


@pytest.mark.parametrize(
    "answer",
    [
        {"err": "slurm_load_partitions: Unable to contact slurm controller\n", "code": 1},
        {},
        {"out": "something else entirely\n"},
        {"out": "gpu" + "\x1f?" * 7 + "\n"},
    ],
)
def test_without_a_certain_answer_nothing_is_refused(site: Recorded, answer: dict[str, object]) -> None:
    """Slurm itself has the last word."""
    site.program("sinfo", **answer)
    check(partition="nope", time="99-0")


def test_values_that_nobody_can_read_allow_everything(site: Recorded) -> None:
    """A site may hide them, or a newer Slurm write them in another way."""
    site.program("sinfo", "gpu*|n/a|?|2|many||(null)|(null)\n".replace("|", "\x1f"))
    check(time="99-0", cpus_per_task=999, mem="9T", nodes=2, tp=2)


def test_sinfo_is_asked_once_for_many_pools(site: Recorded) -> None:
    """Its answer is kept for five minutes, when it gave one."""
    executor, answer = SlurmExecutor(), (site.folder / "sinfo.out").read_text()
    site.program("sinfo", code=1)
    executor.check(PoolSpec(name="a", model="none", partition="nope"))
    site.program("sinfo", answer)
    for name in ("a", "b", "c"):
        executor.check(PoolSpec(name=name, model="none"))
    assert len(site.runs("sinfo")) == 2
    with pytest.raises(InvalidInput):
        executor.check(PoolSpec(name="a", model="none", partition="nope"))
