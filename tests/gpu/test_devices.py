"""On which device values are: the model's, whatever the researcher's tensors are on, unless the block says otherwise."""

import pytest
import torch
from torch import nn

from nnsight_hpc import LanguageModel, NNsight
from tests.oracle.architectures import WIDTH
from tests.oracle.compare import same
from tests.oracle.hooks import changed, seeing

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def _hidden(subject, inputs, index=1):
    with seeing(subject.module) as seen:
        subject.run(inputs)
    return seen.output(subject.path(index))


def test_token_ids_on_the_cpu(llama, inputs):
    """Token ids from a tokenizer lie on the CPU; the values of the trace lie where the model is."""
    with llama.model.trace(inputs.cpu()):
        hidden = llama.at(1).output.save()
        logits = llama.head_envoy.output.save()
    assert hidden.device == logits.device == GPU
    assert torch.equal(hidden, _hidden(llama, inputs))
    assert torch.equal(logits, llama.logits(inputs))


@pytest.mark.parametrize(
    "give", [lambda ids: ids.tolist(), lambda ids: {"input_ids": ids}, lambda ids: ids.cpu().numpy()]
)
def test_prompts_in_other_forms(llama, inputs, give):
    """Lists, mappings and arrays are taken as well."""
    with llama.model.trace(give(inputs)):
        logits = llama.head_envoy.output.save()
    assert torch.equal(logits, llama.logits(inputs))


def test_text_on_a_model_that_is_loaded_to_the_gpu(tiny_llama):
    """`device_map` puts the weights on the GPU, and no hook of accelerate stays on the modules."""
    model = LanguageModel(str(tiny_llama), device_map="cuda", dispatch=True)
    with model.trace("the capital of"):
        hidden = model.model.layers[1].output.save()
    ids = model.tokenizer("the capital of", return_tensors="pt").to(GPU)
    with seeing(model.module) as seen, torch.no_grad():
        model.module(**ids, use_cache=False)
    assert torch.equal(hidden, seen.output("model.layers.1"))
    assert [name for name, part in model.module.named_modules() if hasattr(part, "_hf_hook")] == []


@pytest.mark.parametrize("device", [CPU, GPU])
def test_constants_are_taken_from_any_device(llama, inputs, device):
    """A tensor of the researcher is moved to the model, also when it is made in the block."""
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)).to(device)
    with llama.model.trace(inputs):
        llama.at(1).output = llama.at(1).output + direction
        llama.at(2).output[:] *= torch.full((1, 1, WIDTH), 0.5)
        logits = llama.head_envoy.output.save()
    here = direction.to(GPU)
    with changed(llama.module, {llama.path(1): lambda value: value + here, llama.path(2): lambda value: value * 0.5}):
        assert torch.equal(logits, llama.logits(inputs))


MADE = {
    "zeros": lambda v: torch.zeros(v.shape[-1]),
    "ones": lambda v: torch.ones(1, v.shape[1], 1),
    "full": lambda v: torch.full((v.shape[-1],), 2.0),
    "arange": lambda v: torch.arange(v.shape[-1]),
    "linspace": lambda v: torch.linspace(0, 1, v.shape[-1]),
    "eye": lambda v: torch.eye(v.shape[1], v.shape[-1]),
    "window": lambda v: torch.hann_window(v.shape[-1]),
    "zeros_like": torch.zeros_like,
    "new_ones": lambda v: v.new_ones(v.shape[-1]),
    "fftfreq": lambda v: torch.fft.fftfreq(v.shape[-1]),
}


@pytest.mark.parametrize("name", MADE)
def test_tensors_made_of_sizes_lie_beside_the_model_s_values(llama, inputs, name):
    """What the worker makes of a size that only the model knows can be computed with beside its values."""
    with llama.model.trace(inputs):
        hidden = llama.at(1).output
        made = MADE[name](hidden).save()
        total = (hidden + MADE[name](hidden)).save()
    plain = _hidden(llama, inputs)
    with GPU:  # where plain PyTorch makes tensors from now on
        expected = MADE[name](plain)
    assert same(made, expected)
    assert torch.equal(total, plain + expected)


NAMED = {
    "to cuda": lambda v: v.to("cuda"),
    "to cuda:0": lambda v: v.to("cuda:0"),
    "to another GPU than there is": lambda v: v.to("cuda:7"),
    "to a device": lambda v: v.to(torch.device("cuda")),
    "to a value's device": lambda v: v.cpu().to(v.device),
    "cuda()": lambda v: v.cpu().cuda(),
    "cuda(0)": lambda v: v.cuda(0),
    "there and back": lambda v: v.to("cpu").to("cuda"),
    "to a dtype": lambda v: v.to("cuda", torch.float64).float(),
    "by keyword": lambda v: v.to(device="cuda"),
}


@pytest.mark.parametrize("name", NAMED)
def test_every_gpu_by_name_is_the_model_s(llama, inputs, name):
    """Whatever number a script gives its GPU, it means that of the model."""
    with llama.model.trace(inputs):
        moved = NAMED[name](llama.at(1).output).save()
    assert same(moved, _hidden(llama, inputs))


def test_what_is_moved_to_the_cpu_is_there(llama, inputs):
    """`.cpu()` in a block moves the value; facts of values name the real devices."""
    with llama.model.trace(inputs):
        hidden = llama.at(1).output
        moved, mean = hidden.cpu().save(), hidden.to("cpu").mean().save()
        made = torch.zeros(hidden.shape[-1], device="cpu").save()
        device, on_gpu = hidden.device.save(), hidden.is_cuda.save()
    assert same(moved, _hidden(llama, inputs).cpu())
    assert (mean.device, made.device) == (CPU, CPU)
    assert (device, on_gpu) == (GPU, True)


SEED = 11
DRAWN = {
    "bernoulli": lambda v, g: torch.bernoulli(v.sigmoid(), generator=g),
    "multinomial": lambda v, g: torch.multinomial(v[:, -1].softmax(-1), 3, generator=g),
    "normal_": lambda v, g: v.clone().normal_(generator=g),
    "randn": lambda v, g: torch.randn(v.shape[-1], generator=g, device=v.device),
    "randperm": lambda v, g: torch.randperm(v.shape[-1], generator=g, device=v.device),
}


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("name", DRAWN)
def test_seeds_draw_on_the_gpu(llama, inputs, name, device):
    """A generator of any device gives the numbers of its seed on the model's device."""
    with llama.model.trace(inputs):
        hidden = llama.at(1).output
        drawn = DRAWN[name](hidden, torch.Generator(device).manual_seed(SEED)).save()
    plain = torch.Generator(GPU).manual_seed(SEED)
    assert same(drawn, DRAWN[name](_hidden(llama, inputs), plain))


def test_sampling_is_that_of_the_seed(llama, inputs):
    """A generation that samples draws the tokens that plain transformers draws after `torch.manual_seed`."""
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0}
    with llama.model.generate(inputs, seed=SEED, **options) as tracer:
        tokens = tracer.result.save()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(SEED)
        expected = llama.module.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(("device", "kept"), [("cpu", CPU), ("cuda", GPU), (None, GPU)])
def test_cache_is_kept_where_it_is_asked_for(llama, inputs, device, kept):
    """A cache moves its values to the CPU unless another device, or none, is named."""
    options = {} if device == "cpu" else {"device": device}
    with llama.model.trace(inputs) as tracer:
        cache = tracer.cache(modules=[llama.at(1)], **options)
    assert same(cache[llama.path(1)].output, _hidden(llama, inputs).to(kept))


@pytest.mark.parametrize("device", [CPU, GPU])
def test_training_a_direction(llama, inputs, device):
    """A parameter of the researcher gets, on its own device, the gradient that it gets with a hook."""
    direction, plain = (torch.full((WIDTH,), 0.1, device=device, requires_grad=True) for _ in range(2))
    with llama.model.trace(inputs):
        llama.at(1).output = llama.at(1).output + direction
        loss = llama.head_envoy.output.square().mean().save()
    loss.backward()
    found = []
    with changed(llama.module, {llama.path(1): lambda value: value + plain.to(GPU), llama.head: found.append}):
        llama.run(inputs)
    found[0].square().mean().backward()
    assert loss.device == GPU
    assert direction.grad.device == device
    assert torch.equal(direction.grad, plain.grad)


def test_scan_takes_no_memory_of_the_gpu(llama, inputs):
    """Under `scan` values say that they are on the GPU, and nothing is allocated there."""
    with llama.model.scan(inputs):
        pass
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with llama.model.scan(inputs):
        hidden = llama.at(1).output
        device, shape = hidden.device, (hidden @ hidden.mT).shape
        large = hidden.new_zeros(hidden.shape[-1] * 10**9).shape
    assert device == GPU
    assert (shape, large) == ((2, 5, 5), (WIDTH * 10**9,))
    assert torch.cuda.max_memory_allocated() - before < 1 << 16


def test_module_without_parameters():
    """A module that has no tensors computes where its inputs are; one with buffers only, where those are."""
    x, model = torch.randn(3, 4, device=GPU), NNsight(nn.Sequential(nn.Tanh(), nn.ReLU()))
    with model.trace(x):
        value = (model[0].output * torch.ones(4)).save()
    assert torch.equal(value, x.tanh())
    norm = nn.BatchNorm1d(4, affine=False).eval().to(GPU)
    model = NNsight(nn.Sequential(norm))
    with model.trace(x.cpu()):
        value = (model[0].output * torch.ones(4)).save()
    assert torch.equal(value, norm(x))


def test_error_in_a_backward_pass_comes_out_as_it_is(llama, inputs):
    """On a GPU autograd runs hooks in a thread of its own; an error there has its type and the researcher's line."""
    with pytest.raises(RuntimeError) as caught, llama.model.trace(inputs):
        hidden = llama.at(1).output
        with llama.head_envoy.output.sum().backward():
            hidden.grad.view(7, 7, 7).save()
    assert "hidden.grad.view(7, 7, 7).save()" in str(caught.value)
    with llama.model.trace(inputs):
        logits = llama.head_envoy.output.save()
    assert torch.equal(logits, llama.logits(inputs))


def test_many_saves_lie_in_memory_of_their_own(llama, inputs):
    """A saved value keeps what it was when its memory is used again by later traces."""
    states = []
    for seed in range(5):
        with llama.model.trace(llama.inputs(seed=seed)):
            states.append(llama.at(1).output.save())
    assert all(torch.equal(state, _hidden(llama, llama.inputs(seed=seed))) for seed, state in enumerate(states))
