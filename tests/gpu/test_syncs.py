"""Tracing waits for the GPU no more often than hand-written hooks do: the GPU is kept busy while Python runs ahead."""

import warnings
from contextlib import contextmanager

import pytest
import torch

from tests.oracle.architectures import WIDTH
from tests.oracle.hooks import changed


@contextmanager
def counting():
    """While active, notes the lines that wait for the GPU (`torch.cuda.set_sync_debug_mode`)."""
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]


def save_layers(subject, inputs):
    with subject.model.trace(inputs):
        for index in range(4):
            subject.at(index).output.save()


def change_in_place(subject, inputs):
    with subject.model.trace(inputs):
        subject.at(1).output[:, -1] = 0
        subject.at(2).output *= 2
        subject.head_envoy.output.save()


def replace(subject, inputs):
    with subject.model.trace(inputs):
        subject.at(1).output = subject.at(0).output * 2 + 1
        subject.at(2).skip(subject.at(2).input)
        subject.head_envoy.output.mean().save()


def constant_on_the_gpu(subject, inputs):
    direction = torch.ones(WIDTH, device=inputs.device)
    with subject.model.trace(inputs):
        subject.at(1).output = subject.at(1).output + direction
        subject.head_envoy.output.save()


def invokes(subject, inputs):
    with subject.model.trace() as tracer:
        with tracer.invoke(inputs):
            source = subject.at(1).output[:, -1]
        with tracer.invoke(inputs.flip(1)):
            subject.at(1).output[:, -1] = source
            subject.head_envoy.output.save()


def gradient(subject, inputs):
    with subject.model.trace(inputs):
        hidden = subject.at(1).output
        with subject.head_envoy.output.sum().backward():
            hidden.grad.save()


def cache(subject, inputs):
    with subject.model.trace(inputs) as tracer:
        tracer.cache(device=None)


def logit_lens(subject, inputs):
    with subject.model.trace(inputs):
        for index in range(4):
            subject.head_envoy(subject.model.get(subject.norm)(subject.at(index).output)).argmax(-1).save()


PROGRAMS = [save_layers, change_in_place, replace, constant_on_the_gpu, invokes, gradient, cache, logit_lens]


def by_hand(subject, inputs):
    """A plain forward with a hook, and a backward from its end."""
    found = []

    def begin(value):
        found.append((value * 2).detach().requires_grad_())
        return found[0]

    with changed(subject.module, {subject.path(1): begin, subject.head: found.append}):
        subject.run(inputs)
    return torch.autograd.grad(found[1].sum(), found[0])


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_no_more_syncs_than_hooks(any_model, program):
    """With inputs on the GPU, a trace waits for it no more often than a plain forward and backward with a hook do."""
    inputs = any_model.inputs()
    for call in (program, by_hand) * 2:  # what is made once is not counted
        call(any_model, inputs)
    with counting() as ours:
        program(any_model, inputs)
    with counting() as plain:
        by_hand(any_model, inputs)
    assert len(ours) <= len(plain), f"ours: {ours}; with hooks: {plain}"


def test_inputs_from_the_cpu_wait_for_nothing_before_them(llama, inputs):
    """Token ids from a tokenizer are sent to the GPU while it still computes an earlier trace."""
    on_cpu = inputs.cpu()
    save_layers(llama, on_cpu)
    with counting() as from_cpu:
        save_layers(llama, on_cpu)
    with counting() as from_gpu:
        save_layers(llama, inputs)
    assert from_cpu == from_gpu
