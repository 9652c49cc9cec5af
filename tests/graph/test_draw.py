"""Pictures of graphs, drawn by the real Graphviz."""

import re
import xml.etree.ElementTree as ET

import pytest

from nnsight_hpc.graph import GraphBuilder, Ref, TensorRef
from nnsight_hpc.wire.errors import InvalidInput, NotFound
from nnsight_hpc.wire.messages import ModelIdentity

SVG = "{http://www.w3.org/2000/svg}"


def _graph(path="model.layers.3", name="h"):
    builder = GraphBuilder()
    forward = Ref(builder.add("model.forward", TensorRef("t0")))
    value = Ref(builder.add("model.output", forward, path))
    branch = builder.add("control.if", Ref(builder.add("operator.gt", value, 0)))
    twice = Ref(builder.append("operator.mul", (value, 2), {}, None, branch))
    builder.append("model.set_output", (forward, "lm_head", twice), {}, None, branch)
    save = builder.add("save", value)
    return builder.build({name: save}, ModelIdentity(id="tiny"))


def _texts(svg):
    return {"".join(element.itertext()) for element in ET.parse(svg).iter(f"{SVG}text")}


def test_svg_tells_modules_and_operations_apart(tmp_path):
    """Modules, operations and saves have fills of their own, and a legend says which; a conditional is a cluster."""
    file = _graph().draw(tmp_path / "graph.svg")
    groups = {
        g.find(f"{SVG}title").text: g for g in ET.parse(file).iter(f"{SVG}g") if g.find(f"{SVG}title") is not None
    }
    fills = {
        "".join(group.find(f"{SVG}text").itertext()): next(
            part.get("fill") for part in group if part.tag.removeprefix(SVG) in ("ellipse", "polygon")
        )
        for group in groups.values()
        if group.get("class") == "node" and group.find(f"{SVG}text") is not None
    }
    assert fills["model.layers[3]"] == fills["lm_head"] == fills["module of the model"]
    assert fills["· * 2"] == fills["· > 0"] == fills["operation"]
    assert fills["save h"] == fills["saved value"]
    assert len({fills["module of the model"], fills["operation"], fills["saved value"], fills["change"]}) == 4
    assert groups["cluster_3"].get("class") == "cluster"


def test_dot_needs_no_graphviz(tmp_path, monkeypatch):
    """The language of Graphviz is written without the program."""
    monkeypatch.setenv("PATH", str(tmp_path))
    text = _graph().draw(tmp_path / "graph.dot").read_text("utf-8")
    assert re.search(r'm0 -> n2 \[label="output"\];', text)
    assert "subgraph cluster_3" in text


def test_missing_graphviz_says_what_to_install(tmp_path, monkeypatch):
    """Without the program the error names packages and the way without it, and nothing is written."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotFound, match=r'(?s)apt install graphviz.*conda.*draw\("graph\.dot"\)'):
        _graph().draw(tmp_path / "graph.svg")
    assert list(tmp_path.iterdir()) == []


def test_other_endings_are_refused(tmp_path):
    """An ending that Graphviz would guess at is an error that lists those that are known."""
    with pytest.raises(InvalidInput, match=r"\.svg, \.png, \.pdf, \.dot"):
        _graph().draw(tmp_path / "graph.exe")


@pytest.mark.parametrize(
    "text",
    [
        'a"]; b [label="x',
        "back\\slash\\N\\G",
        "<b>bold</b>",
        "&lt;&amp;#65;",
        "line\nbreak",
        "\x1b[31m\x00",
        "<svg onload=x>",
    ],
)
def test_labels_are_shown_as_they_are(tmp_path, text):
    """No quote, escape, entity or tag in a path or name means anything to Graphviz or to the SVG."""
    file = _graph(path=text, name=text).draw(tmp_path / "graph.svg")
    shown = "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
    assert {f"save {shown}".split("\n")[0]} <= _texts(file)
    assert {element.tag.removeprefix(SVG) for element in ET.parse(file).iter()} <= {
        *("svg", "g", "title", "polygon", "text", "path", "ellipse", "polyline"),
    }
