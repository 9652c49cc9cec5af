"""The text of a job's script, and the checks of what people write into a pool."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.slurm.batch.options import farewell, memory_bytes, time_limit
from nnsight_hpc.slurm.batch.script import local_script, sbatch_script
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec

if TYPE_CHECKING:
    from collections.abc import Callable

PLACES = places_at(Path("/shared/a b"))


def script(*, begin: float | None = None, **options: object) -> str:
    spec = PoolSpec(**{"name": "tiny", "model": "none", **options})
    return sbatch_script("r1", spec, PLACES, worker="worker", begin=begin)


def directives(text: str) -> list[str]:
    """The options as Slurm reads them: words of #SBATCH lines, up to the first line that is no comment."""
    lines = text.split("\n")
    head = lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]
    return [word for line in head if line.startswith("#SBATCH ") for word in slurm_words(line.removeprefix("#SBATCH "))]


def slurm_words(line: str) -> list[str]:
    """The words of an option line, as sbatch reads it: a backslash keeps the next character, in quotes as well.

    `test_slurm.test_values_with_quotes_arrive_as_they_are` shows that this is so.
    """
    words, quote, escaped, inside = [""], "", False, False
    for character in line:
        if escaped:
            words[-1], escaped = words[-1] + character, False
        elif character == "\\":
            escaped = inside = True
        elif quote or character in "'\"":
            words[-1] += character if quote and character != quote else ""
            quote = "" if character == quote else quote or character
            inside = True
        elif character.isspace():
            words += [""] if inside else []
            inside = False
        elif character == "#" and not inside:
            break
        else:
            words[-1], inside = words[-1] + character, True
    assert not quote
    assert not escaped
    return words if inside else words[:-1]


def test_the_whole_script_of_a_simple_pool() -> None:
    """Options sorted; no requeue, no environment, a log that is appended to, a comment that names replica and home."""
    assert directives(script()) == [
        "--chdir=/shared/a b/replicas/r1",
        "--comment=nnsight-hpc replica r1 home 59ec8ecc",
        "--export=NONE",
        "--job-name=nnsight-hpc-tiny",
        "--no-requeue",
        "--nodes=1",
        "--ntasks=1",
        "--ntasks-per-node=1",
        "--open-mode=append",
        "--output=/shared/a b/replicas/r1/log",
        "--time=01:00:00",
    ]
    assert "export SLURM_EXPORT_ENV=ALL" in script()
    started = f"{sys.executable} -m worker --home '/shared/a b' --replica r1"
    assert f"srun --mpi=none --kill-on-bad-exit=1 {started} &" in script().splitlines()


def test_all_resources_and_places() -> None:
    """Every key of a pool becomes the option of that name; raw arguments come last, in their order."""
    options = {"partition": "gpu", "account": "lab", "qos": "long", "constraint": "a100&nvlink", "reservation": "r"}
    text = script(
        **options,
        nodes=2,
        tp=7,
        gpus_per_node=4,
        cpus_per_task=8,
        mem="64G",
        sbatch_args=("--nice=1", "--hold"),
    )
    found = directives(text)
    expected = [f"--{key}={value}" for key, value in options.items()]
    expected += [
        "--nodes=2",
        "--ntasks=7",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=8",
        "--mem=64G",
    ]
    assert set(expected) < set(found)
    assert found[-2:] == ["--nice=1", "--hold"]
    assert sorted(found[:-2], key=lambda option: option.partition("=")[0]) == found[:-2]


def test_several_ranks_run_under_mpi4py_and_srun_is_told_their_cpus() -> None:
    """Some versions of srun do not inherit --cpus-per-task; an error of one rank aborts all; each line says whose it is."""
    lines = script(mpi="pmi2", tp=2, cpus_per_task=3).splitlines()
    worker = f"{sys.executable} -m mpi4py -m worker --home '/shared/a b' --replica r1 --ranks 2"
    assert f"srun --mpi=pmi2 --kill-on-bad-exit=1 --label --cpus-per-task=3 {worker} &" in lines


def test_what_srun_needs_for_several_ranks_is_found_in_the_job() -> None:
    """After the pool's setup, which may load another MPI library."""
    lines = script(tp=2, setup=("module load openmpi",)).splitlines()
    found = lines.index(f"mpi=$({sys.executable} -m nnsight_hpc.slurm.batch.mpi) || exit")
    assert (
        lines.index("module load openmpi")
        < found
        < next(n for n, li in enumerate(lines) if li.startswith("srun --mpi="))
    )
    assert 'srun --mpi="$mpi" --kill-on-bad-exit=1' in "\n".join(lines)


def test_ranks_that_the_nodes_do_not_divide_are_spread() -> None:
    """Each node gets its share, rounded up, until none is left."""
    text = script(tp=5, nodes=2, mpi="pmix")
    assert "srun --mpi=pmix --kill-on-bad-exit=1 --label --distribution=plane=3 " in text
    assert "plane" not in script(tp=4, nodes=2, mpi="pmix")


def test_ranks_on_this_machine_are_started_by_mpirun() -> None:
    """One process needs no MPI at all."""
    text = local_script("r1", PoolSpec(name="tiny", model="none", tp=3), PLACES, worker="worker")
    assert (
        f"mpirun $label -n 3 {sys.executable} -m mpi4py -m worker --home '/shared/a b' --replica r1 --ranks 3 &" in text
    )
    assert "mpirun" not in local_script("r1", PoolSpec(name="tiny", model="none"), PLACES, worker="worker")


def test_gres_in_place_of_gpus_per_node() -> None:
    """Sites accept one or the other; both at once are refused, other kinds of gres go with GPUs."""
    assert "--gres=gpu:a100:2" in directives(script(gres="gpu:a100:2"))
    assert {"--gres=nvme:1", "--gpus-per-node=2"} < set(directives(script(gres="nvme:1", gpus_per_node=2)))
    with pytest.raises(InvalidInput, match="gpus_per_node or gres, not both"):
        script(gres="gpu:2", gpus_per_node=2)


def test_an_exclusive_node_comes_with_its_memory() -> None:
    """--exclusive alone would give all CPUs and GPUs, but not the memory."""
    assert "--mem=0" in directives(script(sbatch_args=("--exclusive",)))
    assert "--mem=8G" in directives(script(sbatch_args=("--exclusive",), mem="8G"))
    assert not [option for option in directives(script()) if option.startswith("--mem")]


def test_a_job_may_begin_later() -> None:
    """In seconds from now, whatever the clocks' zones; what is past or not given is no option."""
    options = [option for option in directives(script(begin=time.time() + 90)) if "begin" in option]
    assert options in (["--begin=now+90"], ["--begin=now+89"])
    assert script() == script(begin=time.time() - 5) == script(begin=time.time())


@pytest.mark.parametrize(("limit", "seconds"), [(60, 7), (120, 15), (960, 120), (86400, 120)])
def test_a_job_drains_before_its_end(limit: int, seconds: int) -> None:
    """Two minutes before the end of a long job, an eighth of the time of a short one."""
    assert seconds == farewell(limit)
    assert f"left=$((ends - begun - {seconds}))" in script(time=f"0:{limit}")


@pytest.mark.parametrize(
    ("mem", "number"),
    [("0", 0), ("4000", 4000 << 20), ("64G", 64 << 30), ("2T", 2 << 40), ("512M", 512 << 20), ("8K", 8192)],
)
def test_memory_in_slurms_forms(mem: str, number: int) -> None:
    """Without a unit it is MiB."""
    assert number == memory_bytes(mem)


@pytest.mark.parametrize("key", ["partition", "account", "qos", "constraint", "reservation", "gres"])
@given(value=st.text(max_size=40) | st.text("'\"\\ #a-=", max_size=20))
def test_a_value_is_one_value_or_refused(key: str, value: str) -> None:
    """Whatever people write is exactly one value of one option; what cannot be one is refused."""
    try:
        text = script(**{key: value})
    except InvalidInput:
        text = ""
    assert bool(text) == (bool(value) and value.isprintable())
    if text:
        assert sorted([*directives(script()), f"--{key}={value}"]) == sorted(directives(text))


@given(
    argument=st.text(max_size=40).map("--".__add__)
    | st.text("'\"\\ #a-=").map("--licenses=".__add__)
    | st.text(max_size=10)
)
def test_a_raw_argument_is_one_argument_or_refused(argument: str) -> None:
    """It stays one option with one value, after all others, and is none of those that nnsight-hpc needs."""
    try:
        text = script(sbatch_args=(argument,))
    except InvalidInput:
        return
    assert argument == directives(text)[-1]
    assert argument.startswith("--")
    assert not argument.startswith(("--output", "--array", "--export", "--wrap"))


@given(line=st.text(max_size=40))
def test_a_setup_line_is_one_line_or_refused(line: str) -> None:
    """It is the owner's own shell command, but never a line of options."""
    try:
        text = script(setup=(line,))
    except InvalidInput:
        return
    assert Counter(text.split("\n")) - Counter(script().split("\n")) == {line: 1}
    assert directives(script()) == directives(text)


@pytest.mark.parametrize(
    "options",
    [
        {"time": "UNLIMITED"},
        {"time": "INFINITE"},
        {"time": "0"},
        {"time": "-1"},
        {"time": ""},
        {"time": "1:2:3:4"},
        {"time": "10\n#SBATCH --wrap=id"},
        {"mem": "1 G"},
        {"mem": "8G --array=1-5"},
        {"mem": ""},
        {"nodes": 0},
        {"tp": -1},
        {"mpi": "pmix; id"},
        {"cpus_per_task": 0},
        {"gpus_per_node": -1},
        {"partition": "gpu\n#SBATCH --uid=0"},
        {"partition": ""},
        {"account": "a\x1b[31m"},
        {"name": "a b"},
        {"name": "a\n#SBATCH --array=1-9"},
        {"setup": ("module load x\n#SBATCH --array=1-9",)},
        {"sbatch_args": ("--output=/etc/x",)},
        {"sbatch_args": ("--outp=/etc/x",)},
        {"sbatch_args": ("--arr=1-9",)},
        {"sbatch_args": ("--nodes=3",)},
        {"sbatch_args": ("--begin=22:00",)},
        {"sbatch_args": ("-p gpu",)},
        {"sbatch_args": ("--mail-user=x\n--array=1-9",)},
        {"sbatch_args": ("--licenses=",)},
        {"sbatch_args": ("hetjob",)},
    ],
)
def test_bad_values_are_refused(options: dict[str, object]) -> None:
    """Before anything is submitted, and saying which key."""
    with pytest.raises(InvalidInput) as caught:
        script(**options)
    key = next(iter(options))
    assert key in str(caught.value) or key == "name"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 600), ("1:30", 90), ("02:00:00", 7200), ("1-12", 129600), ("1-0:30", 88200), ("2-01:01:01", 176461)],
)
def test_time_limits_in_slurms_forms(text: str, seconds: int) -> None:
    """minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds."""
    assert seconds == time_limit(text)


@given(st.text())
def test_model_names_do_not_reach_the_script(model: str) -> None:
    """The worker reads its pool from a file: nothing of the model is ever shell text."""
    assert script() == script(model=model)


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("make", [partial(sbatch_script, begin=None), local_script])
def test_bash_accepts_the_script(make: Callable[..., str], tp: int) -> None:
    """`bash -n` reads it without a complaint."""
    spec = PoolSpec(name="tiny", model="none", setup=("echo 'a \"b'",), nodes=2, tp=tp, cpus_per_task=1)
    text = make("r1", spec, PLACES, worker="worker")
    done = subprocess.run(["bash", "-n"], input=text, check=False, capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stderr) == (0, "")
