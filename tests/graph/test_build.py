import subprocess
import sys

import pytest

from nnsight_hpc.graph import capture_graph, expand_points, validate
from nnsight_hpc.wire.errors import InvalidInput, NotFound
from nnsight_hpc.wire.messages import ModelIdentity

PATHS = ["", "model", "model.layers", *(f"model.layers.{i}{part}" for i in range(3) for part in ("", ".mlp"))]


def test_star_is_any_one_part_in_the_model_s_order():
    """`*` matches one part of a path, and the points come in the order of the modules."""
    found = expand_points(["model.layers.*.output"], PATHS)
    assert list(found) == [f"model.layers.{i}.output" for i in range(3)]


def test_point_that_matches_nothing_gets_near_names():
    """A misspelt module is refused with what it may have meant."""
    with pytest.raises(NotFound) as caught:
        expand_points(["model.layer.0.output"], PATHS)
    assert "model.layers.0" in str(caught.value)


def test_point_without_a_kind_is_refused():
    """A module path alone is no point; the message says what to write."""
    with pytest.raises(InvalidInput, match="is not a point"):
        expand_points(["model.layers.0"], PATHS)


def test_capture_graph_is_valid_and_readable():
    """The graph of a capture passes validation and prints what it saves under its name."""
    graph = capture_graph({"r": "model.layers.1.output"}, ModelIdentity(id="m"))
    validate(graph)
    assert "r = model.layers[1].output.save()" in str(graph)


def test_graph_and_wire_load_no_torch():
    """The daemon's imports of graph and wire do not pull in torch or numpy."""
    code = "import sys, nnsight_hpc.graph.cobatch, nnsight_hpc.wire.http; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
