"""Requests that are not waited for, and recorded graphs that run again."""

import threading

import pytest
import torch

from nnsight_hpc import Graph
from nnsight_hpc.execution import run_graph
from nnsight_hpc.tracing import block_run
from nnsight_hpc.tracing.context import Trace
from nnsight_hpc.wire.errors import InvalidInput

PROMPT = "the tower is in the city of"


class InAThread:
    """A backend that runs graphs in a thread of this process, from their documents."""

    remote = True

    def __init__(self):
        self.go = threading.Event()

    def submit(self, graph, tensors, model):
        return Running(graph.to_json(), tensors, model.module, self.go)


class Running:
    id = "r-1"

    def __init__(self, document, tensors, module, go):
        def work():
            go.wait()
            self._results = run_graph(Graph.from_json(document), tensors, module)

        self._thread = threading.Thread(target=work)
        self._thread.start()

    def status(self):
        return "running" if self._thread.is_alive() else "completed"

    def result(self, timeout=None):
        self._thread.join(timeout)
        return self._results


def test_names_are_bound_when_the_result_is_asked_for(model, net, x):
    """Until then they are placeholders that name the request; other names of the frame are left alone."""
    backend = InAThread()
    with Trace(model, backend, (x,), {}, blocking=False) as tracer:
        hidden = model[0].output.save()
        out = [model.output.save()]
    other = 7
    with pytest.raises(InvalidInput, match="not here yet") as caught:
        _ = hidden + 1
    assert "r-1" in str(caught.value)
    assert tracer.request.status() == "running"
    backend.go.set()
    results = tracer.request.result(timeout=60)
    assert type(hidden) is torch.Tensor
    torch.testing.assert_close(hidden, net[0](x))
    torch.testing.assert_close(out, [net(x)])
    assert results.keys() == {"hidden", "out[0]"}
    assert other == 7
    assert tracer.request.id == "r-1"


def test_result_in_another_function(model, net, x):
    """A value that left its function still knows its result."""
    backend = InAThread()

    def submitted():
        with Trace(model, backend, (x,), {}, blocking=False) as tracer:
            return_value = model.output.save()
        return tracer.request, return_value

    request, value = submitted()
    backend.go.set()
    request.result()
    torch.testing.assert_close(value.result(), net(x))


def test_a_local_trace_is_waited_for(model, x):
    """What runs in this process runs when its block ends."""
    with pytest.raises(InvalidInput, match="in this process"):
        model.trace(x, blocking=False)
    with model.trace(x) as tracer:
        model.output.save()
    with pytest.raises(InvalidInput, match="no request"):
        _ = tracer.request


def test_graph_with_other_inputs(lm):
    """A recorded graph runs again, with its own constants, on what it is given."""
    shift = torch.ones(32)
    with lm.trace(PROMPT) as tracer:
        lm.model.layers[0].output = lm.model.layers[0].output + shift
        logits = lm.lm_head.output.save()
    assert torch.equal(lm.run(tracer.graph)["logits"], logits)
    handle = lm.module.model.layers[0].register_forward_hook(lambda _m, _i, out: out + 1)
    expected = lm.module(lm.tokenizer("one two", return_tensors="pt")["input_ids"], use_cache=False).logits
    handle.remove()
    torch.testing.assert_close(lm.run(tracer.graph, "one two")["logits"], expected)
    document = Graph.from_json(tracer.graph.to_json())
    again = lm.run(document, "one two", tensors=tracer.graph.tensors)
    torch.testing.assert_close(again["logits"], expected)


def test_graph_with_another_constant(model, net, x):
    """One tensor constant is given anew, the others stay as recorded; a name that the graph does not have is refused."""
    with model.trace(x) as tracer:
        out = (model.output * torch.full((2,), 2.0) + torch.ones(2)).save()
    names = [name for name, tensor in tracer.graph.tensors.items() if torch.equal(tensor, torch.ones(2))]
    again = model.run(tracer.graph, tensors={names[0]: torch.full((2,), 5.0)})["out"]
    torch.testing.assert_close(again, net(x) * 2 + 5)
    torch.testing.assert_close(model.run(tracer.graph)["out"], out)
    with pytest.raises(InvalidInput, match=f"(?s)no tensor 'steering'.*{names[0]}"):
        model.run(tracer.graph, tensors={"steering": torch.ones(2)})


def test_generation_with_other_inputs_keeps_its_options(lm):
    """What is no input stays as it was recorded."""
    with lm.generate(PROMPT, max_new_tokens=2) as tracer:
        tokens = tracer.result.save()
    assert tokens.shape == (1, 9)
    assert lm.run(tracer.graph, "one two")["tokens"].shape == (1, 4)


def test_graph_of_two_forwards_takes_no_inputs(lm):
    """Which forward would get them is not said, so they are refused."""
    with lm.trace() as tracer:
        for prompt in ("one two", PROMPT):
            with tracer.invoke(prompt):
                logits = lm.lm_head.output.save()
    with pytest.raises(InvalidInput, match="2 forwards"):
        lm.run(tracer.graph, "one")
    assert torch.equal(lm.run(tracer.graph)["logits"], logits)


@pytest.mark.parametrize("kind", ["trace", "session", "edit"])
def test_a_block_that_cannot_begin_is_not_open(model, x, kind, monkeypatch):
    """An error while the block's source is looked at (or Ctrl-C there) leaves nothing open that refuses the next trace."""
    context = {"trace": lambda: model.trace(x), "session": model.session, "edit": model.edit}[kind]()
    with monkeypatch.context() as patched:
        patched.setattr(block_run, "enter", _interrupted)
        with pytest.raises(KeyboardInterrupt), context:
            pass
    with model.trace(x):
        output = model.output.save()
    assert torch.equal(output, model.module(x))


def _interrupted(_frame):
    raise KeyboardInterrupt
