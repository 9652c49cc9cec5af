"""The text of a job's script, and the checks of what people write into a pool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.slurm.batch.options import time_limit
from nnsight_hpc.slurm.batch.script import sbatch_script
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import PoolSpec
from nnsight_hpc.wire.places import places_at

PLACES = places_at(Path("/shared/a b"))


def script(mpi: str = "none", **options: object) -> str:
    spec = PoolSpec(**{"name": "tiny", "model": "none", **options})
    return sbatch_script("r1", spec, PLACES, worker="worker", mpi=mpi)


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
    """Options sorted; no requeue, no environment, a log that is appended to, USR2 to the batch shell."""
    assert directives(script()) == [
        "--chdir=/shared/a b/replicas/r1",
        "--comment=nnsight-hpc replica r1",
        "--export=NONE",
        "--job-name=nnsight-hpc-tiny",
        "--no-requeue",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--open-mode=append",
        "--output=/shared/a b/replicas/r1/log",
        "--signal=B:USR2@120",
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
        tasks_per_node=4,
        gpus_per_node=4,
        cpus_per_task=8,
        mem="64G",
        sbatch_args=("--nice=1", "--hold"),
    )
    found = directives(text)
    expected = [f"--{key}={value}" for key, value in options.items()]
    expected += ["--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=8", "--mem=64G"]
    assert set(expected) < set(found)
    assert found[-2:] == ["--nice=1", "--hold"]
    assert sorted(found[:-2]) == found[:-2]


def test_several_tasks_run_under_mpi4py_and_srun_is_told_their_cpus() -> None:
    """Some versions of srun do not inherit --cpus-per-task; an error of one rank aborts all."""
    text = script("pmix", tasks_per_node=2, cpus_per_task=3)
    assert f"srun --mpi=pmix --kill-on-bad-exit=1 --cpus-per-task=3 {sys.executable} -m mpi4py -m worker --home" in text


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


def test_a_short_job_is_told_of_its_end_later() -> None:
    """Two minutes before the end, but never in the first three quarters of the time."""
    assert "--signal=B:USR2@30" in directives(script(time="2"))


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
    | st.text("'\"\\ #a-=").map("--begin=".__add__)
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
    lines = text.split("\n")
    lines.remove(line)
    assert script().split("\n") == lines
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
        {"tasks_per_node": -1},
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
    ("time", "seconds"),
    [("10", 600), ("1:30", 90), ("02:00:00", 7200), ("1-12", 129600), ("1-0:30", 88200), ("2-01:01:01", 176461)],
)
def test_time_limits_in_slurms_forms(time: str, seconds: int) -> None:
    """minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds."""
    assert seconds == time_limit(time)


@given(st.text())
def test_model_names_do_not_reach_the_script(model: str) -> None:
    """The worker reads its pool from a file: nothing of the model is ever shell text."""
    assert script() == script(model=model)


def test_bash_accepts_the_script() -> None:
    """`bash -n` reads it without a complaint."""
    text = script(setup=("echo 'a \"b'",), nodes=2, cpus_per_task=1)
    done = subprocess.run(["bash", "-n"], input=text, check=False, capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stderr) == (0, "")
