"""The guide to `m.source` does what it says."""

import re
from pathlib import Path

import torch

GUIDE = Path(__file__).parent.parent.parent / "docs" / "guides" / "source.md"


def test_snippets_of_the_guide_run(capsys):
    """The Python blocks run in order; what they print and keep is what the text shows."""
    text, namespace = GUIDE.read_text("utf-8"), {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(GUIDE), "exec"), namespace)
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    assert [_names(line) for line in shown.splitlines()[1:]] == [_names(line) for line in printed.splitlines()[1:8]]
    lm = namespace["lm"]
    assert (namespace["heads"].shape, namespace["middle"].shape) == ((1, 5, 4, 8), (1, 5, 32))
    assert torch.allclose(namespace["pattern"].sum(-1), torch.ones(1, 4, 5))
    plain = lm.module(namespace["ids"]).logits
    assert not any(torch.allclose(namespace[name], plain) for name in ("ablated", "sharper"))


def _names(line):
    """A line of a listing without its number."""
    return re.sub(r"\s+\d*", " ", line).split("->")
