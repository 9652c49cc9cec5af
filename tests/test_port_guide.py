"""Every snippet of the guide for people who come from nnsight runs, and does what the text says."""

import linecache
import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "from-nnsight.md"
_SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
_PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
pytestmark = pytest.mark.slow


class Guide:
    """The sections of the guide by title, run in order and each once."""

    def __init__(self, smollm2, folder):
        title, *rest = _SECTION.split(GUIDE.read_text("utf-8"))
        self._sections = {"": title, **dict(zip(rest[::2], rest[1::2], strict=True))}
        self._smollm2, self._folder = str(smollm2), folder
        self._done, self.names = [], {"__name__": "guide"}
        self.run("")

    def run(self, title):
        for number, block in enumerate(_PYTHON.findall(self._sections[title])):
            code = block.replace("~/.cache/nnsight-hpc/models/SmolLM2-135M-Instruct", self._smollm2)
            code = code.replace('"graph.dot"', repr(str(self._folder / "graph.dot")))
            name = f"<from-nnsight.md {title} {number}>"
            linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)  # as a notebook does
            exec(compile(code, name, "exec"), self.names)
        self._done.append(title)
        return self.names

    @property
    def left(self):
        return {title for title, text in self._sections.items() if _PYTHON.search(text)} - set(self._done)


@pytest.fixture(scope="module")
def guide(smollm2, tmp_path_factory):
    return Guide(smollm2, tmp_path_factory.mktemp("guide"))


def test_logit_lens(guide):
    """The lens of the last layer is the model's own answer, and one of an early layer is not."""
    import torch

    names = guide.run("Logit lens")
    assert len(names["lens"]) == 30
    assert names["best"][-1] == " Paris"
    assert names["best"][0] != " Paris"
    assert all(type(p) is torch.Tensor and abs(p.sum() - 1) < 1e-3 for p in names["lens"])


def test_activation_patching(guide):
    """The answer moves from Rome to Paris the later the patched layer, and the session gives the same numbers."""
    names = guide.run("Activation patching")
    assert names["before"] < 0
    assert names["patched"][-1] > 0
    assert names["patched"][0] < names["patched"][2] < names["patched"][3]
    assert [float(a) for a in names["sweep"]] == pytest.approx([float(b) for b in names["patched"]], abs=1e-3)


def test_steering(guide):
    """The direction changes what is generated into praise, and the prompt stays."""
    names = guide.run("Steering")
    plain, steered = (names["model"].tokenizer.decode(names[name][0]) for name in ("plain", "steered"))
    assert "wonderful" in steered
    assert "wonderful" not in plain
    assert plain.startswith(names["PROMPT"])
    assert steered.startswith(names["PROMPT"])


def test_attribution_patching(guide):
    """The estimate is exact to first order: in the last layer it is near to the real effect."""
    names = guide.run("Attribution patching")
    real = float(names["patched"][-1] - names["before"])
    assert names["attribution"][-1] == pytest.approx(real, rel=0.35)
    assert abs(names["attribution"][0]) < abs(names["attribution"][-1])


def test_dictionary_features(guide):
    """The feature is active on the clean prompt, and without it Paris loses."""
    names = guide.run("Dictionary features")
    assert names["active"][0] > 0
    assert names["ablated"] < names["whole"] - 1


def test_low_rank_edit(guide):
    """Training lowers the loss; the edited model has learned, the model itself has not changed."""
    names = guide.run("A low-rank edit, as in LoRA")
    assert names["losses"][-1] < names["losses"][0] / 2
    assert names["learned"] > names["original"]
    assert float(names["original"]) == pytest.approx(float(names["before"]), abs=1e-3)


def test_graph(guide):
    """The printed graph has the module's path and the user's name."""
    names = guide.run("Look at what was recorded")
    text = str(names["tracer"].graph)
    assert "h = model.layers[3].output.save()" in text
    assert "model.layers[4].output[:, -1] = h[:, -1] * 2" in text


def test_nothing_is_left_out(guide):
    """Every section with Python in it was run by a test above."""
    assert guide.left == set()
