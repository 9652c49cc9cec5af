"""What researchers write, for tests of memory: programs whose activations are large beside what the libraries take."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nnsight_hpc import LanguageModel


def language_model(width, vocabulary, device, dtype):
    """A random Llama of eight blocks."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        module = LlamaForCausalLM(config).to(dtype)
    return LanguageModel(module.eval().requires_grad_(requires_grad=False))


def token_ids(rows, tokens, vocabulary, device):
    return torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(1)).to(device)


def one_layer(model, ids):
    with model.trace(ids) as tracer:
        model.model.layers[3].output.save()
    return tracer


def a_mean_of_every_layer(model, ids):
    with model.trace(ids) as tracer:
        for layer in model.model.layers:
            layer.output.float().mean().save()
    return tracer


def every_layer(model, ids):
    with model.trace(ids) as tracer:
        for layer in model.model.layers:
            layer.output.save()
    return tracer


def logits(model, ids):
    with model.trace(ids) as tracer:
        model.lm_head.output.save()
    return tracer


def log_probabilities(model, ids):
    with model.trace(ids) as tracer:
        model.lm_head.output.float().log_softmax(-1).max(-1).values.save()
    return tracer


def logit_lens(model, ids):
    with model.trace(ids) as tracer:
        for layer in model.model.layers:
            model.lm_head(model.model.norm(layer.output)).argmax(-1).save()
    return tracer


def steering(model, ids):
    direction = torch.ones(model.module.config.hidden_size, dtype=model.module.dtype)
    with model.trace(ids) as tracer:
        model.model.layers[3].output = model.model.layers[3].output + direction
        model.lm_head.output[:, -1].save()
    return tracer


def gradients(model, ids):
    with model.trace(ids) as tracer:
        hidden = model.model.layers[3].output
        with model.lm_head.output[:, -1].float().logsumexp(-1).sum().backward():
            hidden.grad.save()
    return tracer


def invokes(model, ids):
    with model.trace() as tracer:
        for part in ids.split(2):
            with tracer.invoke(part):
                model.model.layers[6].output.save()
    return tracer


def generation(model, ids):
    with model.generate(ids, max_new_tokens=8) as tracer:
        states = tracer.list().save()
        with tracer.iter[:]:
            states.append(model.model.layers[3].output[:, -1])
    return tracer


PROGRAMS = [
    one_layer,
    a_mean_of_every_layer,
    every_layer,
    logits,
    log_probabilities,
    logit_lens,
    steering,
    gradients,
    invokes,
    generation,
]
