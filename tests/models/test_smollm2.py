import pytest

from nnsight_hpc.models import smollm2 as module
from nnsight_hpc.wire.errors import NotFound


@pytest.mark.slow
def test_real_model_answers(smollm2):
    """The converted model knows where the Eiffel Tower is."""
    from nnsight_hpc.models import load, prepare_inputs

    loaded = load(str(smollm2))
    logits = loaded.module(**prepare_inputs("The Eiffel Tower is in the city of", loaded.tokenizer)).logits
    assert loaded.tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    """An error in the middle leaves neither the folder nor a part of it."""

    def fail(_source, folder, _report):
        (folder / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        module.prepare(tmp_path / "smol")
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_at_once(tmp_path, monkeypatch):
    """The second of two that were started at once leaves the first one's folder, and removes its own."""

    def convert(_source, unfinished, _report):
        (unfinished / "config.json").write_text("second")
        (tmp_path / "smol").mkdir()
        (tmp_path / "smol" / "config.json").write_text("first")

    monkeypatch.setattr(module, "_convert", convert)
    folder = module.prepare(tmp_path / "smol", lambda *_: None)
    assert (folder / "config.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]


def test_missing_package_says_how_to_get_it(tmp_path, monkeypatch):
    """Without the package the message has the command."""
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(NotFound, match="pip install"):
        module.prepare(tmp_path / "smol")
