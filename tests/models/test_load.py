import pytest
import torch
from safetensors.torch import load_file, save_file

from nnsight_hpc.models import fingerprint, load, module_tree
from nnsight_hpc.wire.errors import InvalidInput, NotFound
from tests.models_for_tests import save_tiny_llama


def test_loaded_model_is_what_was_saved(tiny_llama):
    """Weights, dtype and identity are those of the folder; progress ends at the whole."""
    seen = []
    loaded = load(str(tiny_llama), progress=lambda done, total: seen.append((done, total)))
    saved = load_file(tiny_llama / "model.safetensors")
    assert all(torch.equal(loaded.module.state_dict()[name], tensor) for name, tensor in saved.items())
    assert not loaded.module.training
    assert loaded.identity.fingerprint == fingerprint(tiny_llama)
    total = (tiny_llama / "model.safetensors").stat().st_size
    assert seen == sorted(seen)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert len({done for done, _ in seen}) > 10


def test_dtype_can_be_chosen(tiny_llama):
    """A dtype by name is the dtype of the parameters."""
    assert load(str(tiny_llama), dtype="bfloat16").module.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float33", "load", "__class__"])
def test_what_is_no_dtype_is_refused(tiny_llama, dtype):
    """A name that is no dtype is refused, whatever else torch has under it."""
    with pytest.raises(InvalidInput, match="is not a dtype"):
        load(str(tiny_llama), dtype=dtype)


@pytest.mark.parametrize("path", ["/no/such/model", "./nothing", "~/nothing-at-all"])
def test_missing_folder_is_named(path):
    """A path that does not exist is NotFound, without asking a hub."""
    with pytest.raises(NotFound, match="no such folder"):
        load(path)


def test_folder_without_a_model_is_named(tmp_path):
    """A folder that holds no model is NotFound."""
    with pytest.raises(NotFound, match=r"config\.json"):
        load(str(tmp_path))


def test_pickled_weights_are_not_read(tiny_llama, tmp_path):
    """A folder with pickled weights only is refused: nothing is unpickled."""
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match="cannot be loaded"):
        load(str(tmp_path))


def spoilt(tiny_llama, folder, spoil):
    """A copy of a model whose tensors, by name, `spoil` has changed."""
    tensors = load_file(tiny_llama / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    return str(folder)


def test_missing_weights_are_not_made_up(tiny_llama, tmp_path):
    """A tensor that no file has is named, instead of random numbers in its place."""
    folder = spoilt(tiny_llama, tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InvalidInput, match="weights are missing") as caught:
        load(folder)
    assert caught.value.why == "no file has model.layers.1.mlp.up_proj.weight"


def test_weights_of_another_shape(tiny_llama, tmp_path):
    """A tensor that does not fit the configuration is refused."""
    folder = spoilt(tiny_llama, tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(InvalidInput, match="cannot be loaded"):
        load(folder)


def test_a_file_that_ends_too_early(tiny_llama, tmp_path):
    """A file that was not copied whole is refused, with what is wrong with it."""
    folder = spoilt(tiny_llama, tmp_path, lambda _tensors: None)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match="cannot be loaded") as caught:
        load(folder)
    assert "incomplete" in caught.value.why.lower()


def test_module_tree_has_no_weights(tiny_llama):
    """The tree has the real names and shapes, on the meta device."""
    tree, real = module_tree(str(tiny_llama)), load(str(tiny_llama)).module
    assert [n for n, _ in tree.named_modules()] == [n for n, _ in real.named_modules()]
    assert all(p.is_meta for p in tree.parameters())


def test_fingerprint_is_that_of_the_weights(tiny_llama, tmp_path):
    """A copy has the same fingerprint; other weights of the same shapes, and one changed tensor, have others."""
    tensors = load_file(tiny_llama / "model.safetensors")
    (tmp_path / "copy").mkdir()
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt", "by": "somebody else"})
    name = sorted(tensors)[3]
    tensors[name] = tensors[name] + 1e-3
    (tmp_path / "edited").mkdir()
    save_file(tensors, tmp_path / "edited" / "model.safetensors", metadata={"format": "pt"})
    other = save_tiny_llama(tmp_path / "other", seed=1)
    prints = [fingerprint(folder) for folder in (tiny_llama, tmp_path / "copy", tmp_path / "edited", other)]
    assert prints[0] == prints[1]
    assert len({*prints}) == 3


def test_fingerprint_of_a_broken_file(tmp_path):
    """A file that is no safetensors is InvalidInput."""
    (tmp_path / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"garbage!")
    with pytest.raises(InvalidInput, match="not a safetensors file"):
        fingerprint(tmp_path)
