"""What stands around a rewritten block: errors at the researcher's lines, debuggers, coverage, newer versions of Python."""

# ruff: noqa: PLR0133, SIM117 - what makes a block be rewritten, and how blocks are written

import json
import linecache
import os
import subprocess
import sys
import textwrap
import traceback
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from nnsight_hpc.tracing import block_run
from nnsight_hpc.wire.errors import HpcError
from tests.test_packaging import _interpreters
from tests.tracing.programs import INPUTS, MODEL, compiled, recorded

ROOT = Path(__file__).parents[2]

REFUSED = {
    "raise": ("if h[0, 0] > 0:\n    raise ValueError('no')", "if h[0, 0] > 0:", "write `assert condition, message`"),
    "match": ("match h[0, 0]:\n    case 0:\n        y = 1", "match h[0, 0]:", "write `if` and `elif`"),
    "dict": ("y = 1 if 1 else 2\nd = {row: 1 for row in h}", "d = {row: 1 for row in h}", "write a list comprehension"),
    "dict of enumerate": ("d = {i: row for i, row in enumerate(h)}", "d = {i: row", "a dict comprehension"),
    "dict with a filter": ("d = {k: 1 for k in [1, 2].copy() if h[0, k] > 0}", "d = {k: 1", "a dict comprehension"),
    "set": ("d = {e for e in h[0]}", "d = {e for", "a set comprehension"),
    "max with a key": ("y = max(h[0], key=abs)", "y = max(", "write a loop with an `if`"),
    "in": ("y = h[0, 0] in [1, 2]", "y = h[0, 0] in", r"tracer\.cond"),
    "sorted": ("y = sorted(h[0]) if 1 else 2", "y = sorted(", r"session\.iter"),
    "helper": (
        "def f(v):\n    return v if v.sum() > 0 else -v\ny = f(h)",
        "return v if",
        "'f', which it calls(.|\\n)*in the block itself",
    ),
    "return": ("def f():\n    return 1\nif h[0, 0] > 0:\n    return 1", "if h[0, 0] > 0:", "holds `return`"),
    "delete": ("y = h\nif h[0, 0] > 0:\n    y = 1\ndel y", "if h[0, 0] > 0:", r"holds `del`(.|\n)*tracer\.cond"),
    "locals": ("locals()\nif h[0, 0] > 0:\n    y = 1", "if h[0, 0] > 0:", "holds `locals`"),
    "objects": ("f = torch.relu if h[0, 0] > 0 else torch.tanh", "f = torch.relu if", "cannot be recorded"),
    "objects by name": (
        "f = torch.relu\nif h[0, 0] > 0:\n    f = torch.tanh\ny = f(h)",
        "y = f(h)",
        "depends on a value",
    ),
    "objects in a loop": (
        "f = torch.relu\nfor row in h:\n    y = f(row)\n    f = torch.tanh\nz = f(h)",
        "z = f(h)",
        "depends on a value",
    ),
    "plain list of objects": ("fs = [torch.relu]\nfor row in h:\n    fs.append(row)", "for row in h:", "list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded(name):
    """What a graph cannot express is refused at the line where it stands, with what to write instead."""
    body, line, message = REFUSED[name]
    with pytest.raises(HpcError, match=message) as caught:
        recorded(body, "1")
    assert line in str(caught.value)
    assert MODEL.module(INPUTS).shape == (2, 4)


FIRST = {
    "if": "if keep:\n    x = 1",
    "for": "for x in [1]:\n    pass",
    "for else": "for x in []:\n    pass\nelse:\n    x = 1",
    "while": "while keep:\n    x = 1\n    break",
    "while true": "while True:\n    x = 1\n    break",
    "pass": "pass\nx = 1",
    "with": "with nullcontext(1) as x:\n    pass",
    "with of try": "with nullcontext(1) as x:\n    try:\n        pass\n    finally:\n        x = 1",
    "string": "'text'\nx = 1",
    "function": "def f():\n    return 1\nx = f()",
    "assert": "assert keep\nx = 1",
    "assignment": "x = [1][0]",
    "comprehension": "(x,) = [y for y in [1]]",
    "global": "global z\nx = 1",
    "import": "import math as x\nx = x.ceil(0.5)",
    "match": "match 1:\n    case x:\n        pass",
    "try": "try:\n    x = 1\n    raise KeyError\nexcept KeyError:\n    pass",
    "bare except": "try:\n    x = 1\n    raise KeyError\nexcept:\n    pass",
    "finally": "try:\n    pass\nfinally:\n    x = 1",
}


@pytest.mark.parametrize("name", FIRST)
def test_whatever_comes_first(name):
    """A block may begin with any statement."""
    rest = "h = MODEL[1].output\nif keep:\n    out = h.sum().save()\nassert traced is context"
    block = textwrap.indent(f"{FIRST[name]}\n{rest}", " " * 8)
    text = f"def run(context, keep):\n    with context as traced:\n{block}\n    return out, x"
    trace = MODEL.trace(INPUTS)
    out, x = compiled(text, {"MODEL": MODEL, "nullcontext": nullcontext})["run"](trace, True)
    assert torch.equal(out, MODEL.module(INPUTS).sum())
    assert x == 1


def test_value_in_a_block_that_begins_with_try():
    """Its own handlers would catch what skips the block, so it runs as it is written, and a value that decides is refused."""
    block = "try:\n    if MODEL[1].output.sum() > 0:\n        y = 1\nexcept KeyError:\n    pass"
    text = "def run():\n    with MODEL.trace(INPUTS):\n" + textwrap.indent(block, " " * 8)
    with pytest.raises(HpcError, match=r"begins with `try:`(.|\n)*write a line of the block before that"):
        compiled(text, {"MODEL": MODEL, "INPUTS": INPUTS})["run"]()
    assert MODEL.module(INPUTS).shape == (2, 4)


def test_no_source():
    """Where the source cannot be read, as in a cell with %%time, the error says so."""
    text = "with MODEL.trace(INPUTS):\n    if MODEL[1].output.sum() > 0:\n        y = 1\n"
    with pytest.raises(HpcError, match=r"cannot be read(.|\n)*%%time(.|\n)*in a cell without(.|\n)*tracer\.cond"):
        exec(compile(text, "<timed exec>", "exec"), {"MODEL": MODEL, "INPUTS": INPUTS})


def _line_of(error):
    return [(f.name, f.line) for f in traceback.extract_tb(error.__traceback__)]


def test_errors_show_the_line():
    """An error of a rewritten block shows the researcher's own lines and nothing of how it was skipped."""
    with pytest.raises(ZeroDivisionError) as caught:
        with MODEL.trace(INPUTS):
            y = 3 if 1 < 2 else 4
            y / 0
    assert _line_of(caught.value)[-1] == ("test_errors_show_the_line", "y / 0")
    text = "".join(traceback.format_exception(caught.value))
    assert "Skipped" not in text
    assert y == 3


def test_error_while_another_is_handled():
    """The exception that was being handled stays the context of one that a block raises."""
    with pytest.raises(ZeroDivisionError) as caught:
        try:
            {}["first"]
        except KeyError:
            with MODEL.trace(INPUTS):
                y = 3 if 1 < 2 else 4
                y / 0
    assert isinstance(caught.value.__context__, KeyError)


def test_errors_inside_a_branch_leave_it():
    """After an error that the block itself catches, what follows is recorded outside of the branch."""
    body = """
        y = 0
        try:
            if h[0, 0] > 100:
                y = h
                undefined
        except NameError:
            y = h * 2
        z = (h[0, 0] > 100) and h
    """
    (y, z), _ = recorded(body, "y, z")
    assert torch.equal(y, MODEL.module(INPUTS) * 2)
    assert not z


def test_an_error_of_the_run():
    """An operation that fails in a branch names the researcher's line in it."""
    with pytest.raises(RuntimeError, match="y = h @ h") as caught:
        recorded("if h[0, 0] > -100:\n    y = h @ h\nelse:\n    y = h", "y")
    assert isinstance(caught.value, HpcError)


def _traced_block():
    with MODEL.trace(INPUTS):
        h = MODEL[1].output
        if h.sum() > 0:
            y = h.save()
        else:
            y = (h * 2).save()
    after = sys.gettrace()
    return y, after


def test_a_trace_function_sees_the_lines():
    """A debugger that is active before the block sees each of its lines, and is still active after it."""
    seen = []

    def tracer(frame, event, _argument):
        if frame.f_code.co_filename == __file__ and event == "line":
            seen.append(linecache.getline(__file__, frame.f_lineno).strip())
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        y, after = _traced_block()
    finally:
        sys.settrace(before)
    assert type(y) is torch.Tensor
    assert after is tracer
    assert list(dict.fromkeys(seen)) == [
        "with MODEL.trace(INPUTS):",
        "h = MODEL[1].output",
        "if h.sum() > 0:",
        "y = h.save()",
        "y = (h * 2).save()",
        "after = sys.gettrace()",
        "return y, after",
    ]


def test_no_trace_function_is_left():
    """Without a debugger none is left behind, also when the block raises or another manager refuses to be entered."""

    class Refuses:
        def __enter__(self):
            raise KeyError("no")

        def __exit__(self, *_):
            pass

    before = sys.gettrace()
    with pytest.raises(KeyError), MODEL.trace(INPUTS), Refuses():
        _ = 1 if INPUTS.sum() == 0 else 2
    assert sys.gettrace() is before
    assert sys._getframe().f_trace is None or before is not None
    with pytest.raises(KeyError):
        with MODEL.trace(INPUTS):
            _ = {}[1 if INPUTS.sum() == 0 else 2]
    assert sys.gettrace() is before


def test_inside_of_a_debugger_callback():
    """Where Python calls no trace functions (a debugger's prompt) the block runs once, as it is written."""
    runs = []

    def prompt(_frame, event, _argument):
        if event == "call" and not runs:
            with MODEL.trace(INPUTS):
                runs.append([k.save() for k in [MODEL[1].output]])

    before = sys.gettrace()
    sys.settrace(prompt)
    try:
        _interpreters()
        assert sys.gettrace() is prompt
    finally:
        sys.settrace(before)
    assert len(runs) == 1
    assert type(runs[0][0]) is torch.Tensor


RUN_COVERED = """
import coverage, json, runpy, sys
c = coverage.Coverage(data_file=None, include=[sys.argv[1]])
c.start()
runpy.run_path(sys.argv[1])
c.stop()
print('MISSED', json.dumps(c.analysis(sys.argv[1])[2]))
"""

COVERED = """
import torch
from tests.tracing.programs import INPUTS, MODEL

def f(flag):
    with MODEL.trace(INPUTS):
        h = MODEL[1].output
        if flag:
            y = h.save()
        else:
            y = (h * 2).save()
        if h.sum() > 0:
            z = 1
        else:
            z = 2
    return y

assert f(True).shape == (2, 4)
done = 1
"""


@pytest.mark.parametrize("core", ["ctrace", "pytrace"])
def test_coverage(tmp_path, core):
    """Coverage counts the lines of a rewritten block that ran, and those after it."""
    pytest.importorskip("coverage")
    program = tmp_path / "covered.py"
    program.write_text(COVERED)
    run = RUN_COVERED
    environment = {**os.environ, "COVERAGE_CORE": core, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", run, program], capture_output=True, text=True, env=environment, check=False
    )
    assert "MISSED [11]" in done.stdout, done.stdout + done.stderr


def test_plain_blocks_are_left_alone():
    """A block without control flow is not rewritten, and what is known of it is looked up once."""
    with MODEL.trace(INPUTS) as tracer:
        y = MODEL[1].output.save()
        frame = sys._getframe()
    assert tracer._rewritten is None
    known = len(block_run._plans)
    for _ in range(3):
        with MODEL.trace(INPUTS) as tracer:
            y = MODEL[1].output.save() if 1 < 2 < 3 else 0
    assert y.shape == (2, 4)
    assert tracer._rewritten is not None
    assert len(block_run._plans) == known + 1
    assert frame.f_trace is None or sys.gettrace() is not None


@pytest.mark.parametrize("python", _interpreters().values(), ids=_interpreters())
def test_mechanics_without_torch(python, tmp_path):
    """On every Python at hand blocks are skipped, rewritten and bound, with a small class in the place of values."""
    program = Path(__file__).with_name("mechanics.py")
    done = subprocess.run([python, program], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["torch"] is False
