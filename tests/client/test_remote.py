"""The whole way on this machine: the remote backend, a real daemon, a real worker, a tiny Llama."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from nnsight_hpc import LanguageModel
from nnsight_hpc.client.backend import RemoteBackend
from nnsight_hpc.client.requests import find
from nnsight_hpc.client.session import connect
from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.values import Absent
from nnsight_hpc.graph import Ref, TensorRef
from nnsight_hpc.graph.build import (
    APPLY,
    BACKWARD,
    GENERATE,
    IF,
    ITEM,
    LOG,
    LOOP,
    RANGE,
    READ_GRAD,
    READS,
    SETS,
    SKIP,
)
from nnsight_hpc.models import load
from nnsight_hpc.wire.errors import HpcError, InvalidGraph, NotFound, RequestCancelled
from nnsight_hpc.wire.pools import PoolStatus
from nnsight_hpc.wire.states import RequestState
from tests.client.remote import IDS, LINE, Program, endless, run, serving, slow, submit
from tests.daemon.process import wait_for
from tests.devices import DEVICE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def pool(tiny_llama) -> Iterator[str]:
    with serving(tiny_llama) as name:
        yield name


@pytest.fixture(scope="module")
def module(tiny_llama) -> torch.nn.Module:
    return load(str(tiny_llama)).module.to(DEVICE)


def worker_of(pool: str) -> str:
    daemon = connect("local")
    job = daemon.get(f"/v1/pools/{pool}", PoolStatus).replicas[-1].job_id
    daemon.close()
    return job


# -- requests ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopped(pool: str) -> Iterator[None]:
    """The worker of a pool does nothing within the block."""
    script = psutil.Process(int(worker_of(pool).partition(":")[0]))
    processes = [script, *script.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def test_submit_returns_before_the_request_has_run(pool, module):
    """It is queued or runs then; its values are there when it has completed, and a second time."""
    program = slow(20)
    with stopped(pool):
        request = submit(program, pool)
        assert not request.status().state.ended
        assert request.wait(0.05).state in (RequestState.QUEUED, RequestState.LEASED, RequestState.RUNNING)
    values = request.result()
    expected = run_graph(program.graph(), {"ids": IDS}, module, log=lambda *_: None)["last"].cpu()
    assert torch.equal(expected, values["last"])
    assert torch.equal(expected, request.result()["last"])


def test_another_process_finds_the_request_by_its_id(pool):
    """It gets the same values under the same names."""
    program = Program()
    program.save("hidden", program.hidden())
    request = submit(program, pool)
    code = f"""
from nnsight_hpc.client.launch import wait_until_gone
from nnsight_hpc.client.requests import find
values = find({request.id!r}).result(60)
print({{name: [list(value.shape), value.double().sum().item()] for name, value in values.items()}})
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    hidden = request.result()["hidden"]
    assert str({"hidden": [[1, 5, 32], hidden.double().sum().item()]}) == done.stdout.strip()


def test_a_running_request_is_cancelled(pool):
    """From any object with its id; who waits for its result is told, and the worker serves on."""
    request = submit(endless(), pool)
    next(request.logs(follow=True))
    find(request.id).cancel()
    with pytest.raises(RequestCancelled):
        request.result(120)
    assert "last" in run(slow(1), pool)


def test_a_value_that_was_never_made_is_absent(pool):
    """What stands in a branch that was not taken comes back as `Absent` that says why."""
    program = Program()
    hidden = program.hidden()
    branch = program.add(
        IF, program.add("operator.gt", program.add("Tensor.sum", program.add("Tensor.abs", hidden)), -1)
    )
    program.save("taken", program.add("operator.mul", hidden, 2, block=branch.id), block=branch.id)
    other = program.add(
        IF, program.add("operator.lt", program.add("Tensor.sum", program.add("Tensor.abs", hidden)), -1)
    )
    program.save("not_taken", program.add("operator.mul", hidden, 3, block=other.id), block=other.id)
    values = submit(program, pool).result()
    assert tuple(values["taken"].shape) == (1, 5, 32)
    assert isinstance(values["not_taken"], Absent)
    assert values["not_taken"].why


# -- what a request says -----------------------------------------------------------------------------------------


def test_lines_are_heard_while_the_request_runs(pool):
    """The first line comes while the request runs, the last at its end; all can be read again later."""
    request = submit(endless(), pool)
    first = next(request.logs(follow=True))
    assert (first.text.startswith("begins"), request.status().state) == (True, RequestState.RUNNING)
    assert str(LINE) == first.source
    request.cancel()
    request = submit(slow(20), pool)
    heard = list(request.logs(follow=True))
    assert [line.text.split()[0] for line in heard] == ["begins", "ends"]
    assert request.status().state == RequestState.COMPLETED
    assert heard == list(find(request.id).logs())


def test_a_blocking_run_prints_what_it_hears_at_once(pool):
    """On stdout, as `print` would, while the request runs."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run(slow(20), pool)
        assert [line.split()[0] for line in out.getvalue().splitlines()] == ["begins", "ends"]
        backend = RemoteBackend(pool=pool, idempotency_key="talks")
        waiting = threading.Thread(target=lambda: _until_cancelled(backend))
        waiting.start()
        wait_for(lambda: out.getvalue().count("begins") == 2)
        assert waiting.is_alive()
        backend.submit(endless().graph(), {"ids": IDS}, None).cancel()  # the same request
        waiting.join()


def _until_cancelled(backend: RemoteBackend) -> None:
    with contextlib.suppress(RequestCancelled):
        backend.run(endless().graph(), {"ids": IDS}, None)


def test_the_command_line_shows_what_a_request_says(pool):
    """`logs ID` what was said so far, `logs ID -f` all of it as it comes, `--json` with the user's lines."""
    request = submit(endless(), pool)
    command = [sys.executable, "-m", "nnsight_hpc.client", "logs"]
    with subprocess.Popen([*command, request.id, "-f"], stdout=subprocess.PIPE, text=True, env=os.environ) as following:
        assert following.stdout is not None
        assert following.stdout.readline().startswith("begins")
        assert not request.status().state.ended
        request.cancel()
    request = submit(slow(20), pool)
    command.append(request.id)
    shown = subprocess.run([*command, "-f"], check=True, capture_output=True, text=True).stdout
    assert [line.split()[0] for line in shown.splitlines()] == ["begins", "ends"]
    said = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout)
    assert [str(LINE)] * 2 == [line["source"] for line in said["log"]]
    assert request.id == said["request"]


# -- errors ------------------------------------------------------------------------------------------------------


def _index(program: Program) -> None:
    program.save("x", program.add("operator.getitem", program.hidden(), (0, 99)))


def _operation(program: Program) -> None:
    program.save("x", program.add("torch.matmul", program.hidden(), program.add("torch.ones", [3, 3])))


def _set(program: Program) -> None:
    forward = program.forward()
    hidden = program.add(READS["output"], forward, "model.layers.0")
    program.add(SETS["output"], forward, "model.layers.0", program.add("operator.getitem", hidden, (slice(None), 0)))
    program.save("x", program.add(READS["output"], forward, "lm_head"))


def _skip(program: Program) -> None:
    forward = program.forward()
    program.add(SKIP, forward, "model.layers.1", program.add("torch.ones", [1, 5, 7]))
    program.save("x", program.add(READS["output"], forward, "lm_head"))


def _loop(program: Program) -> None:
    hidden = program.hidden()
    loop = program.add(LOOP, program.add(RANGE, 0, 100, 1))
    item = program.add(ITEM, loop, block=loop.id)
    program.save("x", program.add("operator.getitem", hidden, (0, item), block=loop.id), block=loop.id)
    program.add("control.end", loop)


def _branch(program: Program) -> None:
    hidden = program.hidden()
    branch = program.add(IF, program.add("operator.lt", program.add("Tensor.sum", hidden), 1e9))
    program.save("x", program.add("operator.getitem", hidden, (99,), block=branch.id), block=branch.id)


def _gradient(program: Program) -> None:
    hidden = program.hidden()
    program.add(BACKWARD, hidden)
    program.save("x", program.add(READ_GRAD, hidden))


def _generation(program: Program) -> None:
    keywords = {"input_ids": TensorRef("ids"), "max_new_tokens": 3}
    forward = Ref(program.builder.append(GENERATE, (), keywords, LINE))
    step = program.add(READS["output"], forward, "lm_head", call=1)
    program.save("x", program.add("operator.getitem", step, (0, 7)))


def _condition(program: Program) -> None:
    branch = program.add(IF, program.hidden())
    program.add(LOG, "never", block=branch.id)


@pytest.mark.parametrize(
    "write",
    [_index, _operation, _set, _skip, _loop, _branch, _gradient, _generation, _condition],
    ids=lambda f: f.__name__,
)
def test_an_error_is_the_same_here_and_there(pool, module, write: Callable[[Program], None]):
    """The same type, the user's line first, the same words; and the worker serves on."""
    program, worker = Program(), worker_of(pool)
    write(program)
    with pytest.raises(HpcError) as here:
        run_graph(program.graph(), {"ids": IDS}, module, log=lambda *_: None)
    with pytest.raises(HpcError) as there:
        run(program, pool)
    assert type(here.value) is type(there.value)
    assert here.value.where.startswith("script.py:7")
    assert str(here.value) == str(there.value)
    assert worker == worker_of(pool)


def test_python_functions_are_refused_by_the_daemon(pool):
    """A graph that calls a function of this process never reaches a worker."""
    program = Program()
    program.save("x", program.add(APPLY, 0, program.hidden()))
    with pytest.raises(InvalidGraph, match=r"local\.apply"):
        run(program, pool)


def _huge(program: Program, device: Ref) -> Ref:
    return program.add("torch.zeros", 10**12, device=device)


def _outer(program: Program, device: Ref) -> Ref:
    line = program.add("torch.zeros", 10**5, device=device)
    return program.add("torch.outer", line, line)


def _expand(program: Program, device: Ref) -> Ref:
    return program.add(
        "operator.add", program.add("Tensor.expand", program.add("torch.zeros", 1, device=device), 10**11), 1
    )


def _many(program: Program, device: Ref) -> Ref:
    forward = program.forward()
    logits = program.add(READS["output"], forward, "lm_head")
    for number in range(1000):
        program.save(
            f"logits{number}", program.add("operator.mul", program.add("Tensor.repeat", logits, 100, 1, 1), number)
        )
    return logits


def _behind_an_error(program: Program, _device: Ref) -> Ref:
    """An index that is wrong ends the estimate; the tensor after it is made before the model runs."""
    program.add("operator.getitem", program.hidden(), (0, 99))
    return program.add("torch.zeros", 10**12)


@pytest.mark.parametrize("write", [_huge, _outer, _expand, _many, _behind_an_error], ids=lambda f: f.__name__)
def test_what_needs_too_much_memory_is_refused_with_the_estimate(pool, write):
    """Before the model runs, at the user's line, with the estimate and the budget; the worker serves on."""
    program, worker = Program(), worker_of(pool)
    device = program.add("attribute", program.hidden(), "device")
    program.save("x", write(program, device))
    with pytest.raises(InvalidGraph) as refused:
        run(program, pool)
    told = str(refused.value)
    assert "script.py:7" in told
    assert "32 MiB" in told
    assert worker == worker_of(pool)
    assert "last" in run(slow(1), pool)


# -- a model from the pool ---------------------------------------------------------------------------------------


def test_a_model_from_the_pool_needs_no_weights(pool, module, tiny_llama, monkeypatch):
    """Config, tokenizer and module tree come from the pool; a trace of it runs there and equals a plain hook."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = LanguageModel.from_pool(pool, "local")
    assert all(parameter.is_meta for parameter in model._module.parameters())
    with model.trace("the capital of", remote=True):
        hidden = model.model.layers[1].output.save()
    seen = []
    ids = model.tokenizer("the capital of", return_tensors="pt")["input_ids"]
    hook = module.model.layers[1].register_forward_hook(lambda _m, _a, output: seen.append(output))
    with torch.no_grad():
        module(input_ids=ids.to(DEVICE))
    hook.remove()
    assert torch.equal(seen[0].cpu(), hidden)


def test_a_trace_that_needs_too_much_names_its_line(pool):
    """The refusal of the worker shows the line of this file."""
    model = LanguageModel.from_pool(pool)
    with pytest.raises(InvalidGraph) as refused, model.trace("the capital of", remote=True):
        hidden = model.model.layers[1].output
        torch.zeros(10**12, device=hidden.device).save()
    assert "torch.zeros(10**12, device=hidden.device).save()" in str(refused.value)
    assert "test_remote.py" in str(refused.value)


def test_a_trace_that_does_not_block_is_found_again(pool):
    """`blocking=False` leaves a request behind, whose values any process can fetch by name."""
    model = LanguageModel.from_pool(pool)
    with model.trace("the capital of", remote=True, blocking=False) as tracer:
        hidden = model.model.layers[1].output.save()
    values = find(tracer.request.id).result(60)
    tracer.request.result()
    assert torch.equal(hidden, values["hidden"])


def test_no_such_pool_is_said_at_once(pool):
    """Naming the pools that there are."""
    with pytest.raises(NotFound, match="there is no pool other"):
        LanguageModel.from_pool("other")


def test_two_threads_have_a_request_each(pool):
    """Requests and connections are not shared between threads."""
    results: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: results.append(submit(slow(1), pool).result(60))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [list(values) for values in results] == [["last"]] * 4
