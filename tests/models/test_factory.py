"""Modules of a pool owner's own: made by their function, filled from safetensors, told apart by their weights."""

import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch import nn

from nnsight_hpc.models.factory import identify_weights, load_factory
from nnsight_hpc.models.fingerprint import fingerprint_of_module, fingerprint_of_tensors
from nnsight_hpc.wire.errors import InvalidInput, NotFound

LAB = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)
            self.last.weight = self.first.weight
            self.register_buffer("table", torch.arange(4.0), persistent=False)

        def forward(self, x):
            return self.last(self.norm(self.first(x)) + self.table)

    def net():
        return Net()

    def with_example():
        return Net(), (torch.ones(2, 4),)

    def with_keywords():
        return Net(), {"x": torch.ones(2, 4)}

    def wrong_example():
        return Net(), torch.ones(2, 4)

    def on_meta():
        with torch.device("meta"):
            return nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))

    def forgotten_on_meta():
        with torch.device("meta"):
            return Net()

    def function():
        return net

    def broken():
        return nn.Linear("four", 4)

    def leaves():
        raise SystemExit(3)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A package of the pool's owner on the path."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "owners_lab.py").write_text(textwrap.dedent(LAB))
    sys.path.insert(0, str(folder))
    import owners_lab

    yield owners_lab
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def saved(lab, tmp_path_factory):
    """A module with a shared weight, in evaluation, and the file that it was saved to."""
    torch.manual_seed(3)
    module = lab.Net().eval()
    module.norm.running_mean.normal_()
    file = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_model(module, str(file))
    return module, file


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_module_has_the_weights_of_the_file(saved):
    """It gives, bit for bit, what the saved one gives; shared weights are shared again; no gradients, no training."""
    module, file = saved
    seen = []
    loaded, example = load_factory("owners_lab:net", str(file), progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(loaded.module(X), module(X))
    assert loaded.module.first.weight is loaded.module.last.weight
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert (loaded.tokenizer, example) == (None, None)
    total = file.stat().st_size
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == ((0, total), (total, total))


def test_loaded_weights_do_not_change_with_their_file(saved, tmp_path):
    """What is resident is a copy: a file that is written again in its place changes nothing."""
    module, file = saved
    copy = tmp_path / "net.safetensors"
    copy.write_bytes(file.read_bytes())
    loaded, _ = load_factory("owners_lab:net", str(copy))
    copy.write_bytes(bytes(copy.stat().st_size))
    assert torch.equal(loaded.module(X), module(X))


def test_folder_of_several_files_and_a_module_on_the_meta_device(lab, tmp_path):
    """Weights in several files are read together, into a module that was made without memory."""
    plain = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)).eval()
    state = plain.state_dict()
    save_file({name: state[name] for name in list(state)[:2]}, tmp_path / "a.safetensors")
    save_file({name: state[name] for name in list(state)[2:]}, tmp_path / "b.safetensors")
    loaded, _ = load_factory("owners_lab:on_meta", str(tmp_path))
    assert torch.equal(loaded.module(X)[0], plain(X)[0])
    assert loaded.identity.fingerprint == fingerprint_of_module(plain)


def test_examples_of_inputs_are_arguments_or_keywords(saved):
    """What the factory gives beside the module is what the module is called with first."""
    _, file = saved
    for name, (args, names) in {"with_example": (1, []), "with_keywords": (0, ["x"])}.items():
        loaded, example = load_factory(f"owners_lab:{name}", str(file))
        assert (len(example[0]), list(example[1])) == (args, names)
        loaded.module(*example[0], **example[1])


@pytest.mark.parametrize("dtype", ["float64", torch.bfloat16])
def test_dtype_can_be_chosen(saved, dtype):
    """All floating-point weights get it; those of other kinds stay as they are."""
    module = load_factory("owners_lab:net", str(saved[1]), dtype=dtype)[0].module
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in module.parameters()} == {wanted}
    assert module.norm.num_batches_tracked.dtype == torch.int64


def test_dtype_of_the_file_is_kept(saved, tmp_path):
    """With `auto` the weights are as they were saved, whatever the factory makes."""
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in _state(saved).items()}
    save_file(half, tmp_path / "half.safetensors")
    module = load_factory("owners_lab:net", str(tmp_path / "half.safetensors"))[0].module
    assert module.first.weight.dtype == torch.float16


def _state(saved):
    return {name: tensor.clone() for name, tensor in saved[0].state_dict().items() if name != "last.weight"}


SPOILT = {
    "missing": (lambda s: s.pop("norm.bias"), "no file has norm.bias"),
    "unexpected": (lambda s: s.update(extra=torch.ones(1)), "the module has no extra"),
    "shape": (lambda s: s.update({"norm.bias": torch.ones(5)}), r"size mismatch for norm\.bias"),
    "both names": (lambda s: s.pop("first.weight"), "no file has first.weight, last.weight"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_weights_that_are_not_the_modules_are_named(saved, tmp_path, kind):
    """A missing weight, one too many, one of another shape: refused with its name."""
    spoil, expected = SPOILT[kind]
    state = _state(saved)
    spoil(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InvalidInput, match="not those of the factory's module") as raised:
        load_factory("owners_lab:net", str(tmp_path / "w.safetensors"))
    assert __import__("re").search(expected, raised.value.why)


def test_a_weight_in_two_files_is_refused(saved, tmp_path):
    """Nobody can say which of the two is meant."""
    save_file(_state(saved), tmp_path / "a.safetensors")
    save_file({"norm.bias": torch.ones(4)}, tmp_path / "b.safetensors")
    with pytest.raises(InvalidInput, match=r"norm\.bias is in two files"):
        load_factory("owners_lab:net", str(tmp_path))


def test_what_the_factory_forgot_on_the_meta_device_is_named(saved):
    """A buffer that no file has, made without memory, would be read as rubbish: it is refused."""
    with pytest.raises(InvalidInput) as raised:
        load_factory("owners_lab:forgotten_on_meta", str(saved[1]))
    assert raised.value.why == "the factory left on the meta device table"


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("no_such_package:net", "No module named 'no_such_package'"),
        ("owners_lab:nothing", "has no attribute 'nothing'"),
        ("owners_lab:broken", 'return nn.Linear("four", 4)'),
        ("owners_lab:leaves", "raise SystemExit(3)"),
    ],
)
def test_errors_of_the_owners_code_are_shown(saved, factory, expected):
    """What the function raised, with the last lines of its traceback: they show the owner's own line."""
    with pytest.raises(InvalidInput, match="factory failed") as raised:
        load_factory(factory, str(saved[1]))
    assert expected in raised.value.why
    assert "factory.py" not in raised.value.why.split("owners_lab.py")[0]


@pytest.mark.parametrize(
    ("factory", "expected"),
    [("owners_lab:function", "made a function, and no"), ("owners_lab:wrong_example", "neither a tuple")],
)
def test_what_is_no_module_or_no_example_is_refused(saved, factory, expected):
    """A function that returns something else says so before weights are read into it."""
    with pytest.raises(InvalidInput, match=expected):
        load_factory(factory, str(saved[1]))


def test_pickles_are_not_read(saved, tmp_path):
    """A folder or file of pickles is NotFound, with how to save the weights instead."""
    torch.save(saved[0].state_dict(), tmp_path / "net.pt")
    for model in (tmp_path, tmp_path / "net.pt", tmp_path / "none.safetensors"):
        with pytest.raises(NotFound, match="no safetensors files") as raised:
            load_factory("owners_lab:net", str(model))
        assert "save_model" in raised.value.next


def test_a_file_that_is_none_is_refused(saved, tmp_path):
    """Bytes that are no safetensors are named, and nothing is unpickled."""
    file = tmp_path / "x.safetensors"
    torch.save(saved[0].state_dict(), file)
    with pytest.raises(InvalidInput, match=r"x\.safetensors is not a safetensors file"):
        identify_weights(str(file))


# -- fingerprints -------------------------------------------------------------------------------------------------------


def test_a_module_and_its_file_have_one_fingerprint(saved, tmp_path):
    """However the weights were saved: in one file or several, with one or both names of a shared one."""
    module, file = saved
    state = module.state_dict()
    both = {name: tensor.clone() for name, tensor in state.items()}
    save_file(both, tmp_path / "both.safetensors")
    (tmp_path / "parts").mkdir()
    for name, tensor in both.items():
        save_file({name: tensor}, tmp_path / "parts" / f"{name}.safetensors")
    expected = fingerprint_of_module(module)
    assert expected.startswith("tensors-")
    for model in (file, tmp_path / "both.safetensors", tmp_path / "parts"):
        assert identify_weights(str(model)).fingerprint == expected


def test_a_module_without_weights_here_stands_for_any(lab):
    """On the meta device, and without a parameter, there is no fingerprint."""
    assert fingerprint_of_module(lab.on_meta()) == ""
    assert fingerprint_of_module(nn.ReLU()) == ""


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2]),
    shape=st.lists(st.integers(0, 40), max_size=3),
    seed=st.integers(0, 1000),
)
def test_fingerprints_of_any_tensor_agree(tmp_path_factory, dtype, shape, seed):
    """Of every dtype and shape, also empty, of no dimension, and not contiguous, the file's is the module's."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    module = nn.Module()
    module.register_buffer("w", tensor.transpose(0, -1) if tensor.ndim > 1 else tensor)
    file = tmp_path_factory.mktemp("f") / "w.safetensors"
    save_file({"w": module.w.contiguous()}, file)
    assert fingerprint_of_tensors([file]) == fingerprint_of_module(module)


@pytest.mark.parametrize("place", [0, 5000, 9999])
def test_a_change_at_either_end_of_a_tensor_is_seen(place):
    """The samples are both ends; a change in the middle of a large tensor is not seen, as the documentation says."""
    module = nn.Linear(100, 100, bias=False)
    before = fingerprint_of_module(module)
    with torch.no_grad():
        module.weight.view(-1)[place] += 1
    assert (fingerprint_of_module(module) == before) == (place == 5000)
