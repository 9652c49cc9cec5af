"""Models in one process and over the ranks, side by side: what stands where in each, and what comes of changes."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_with_path

from nnsight_hpc.execution.source import instrumented, operations_of
from nnsight_hpc.models.load import load, module_tree
from nnsight_hpc.parallel.loading import load_parallel
from nnsight_hpc.parallel.view import ShardedView
from nnsight_hpc.wire.errors import InvalidGraph
from tests.parallel.loading_checks import saved

TOLERANCE = 1e-4
"""Of the largest number of a tensor: float32 sums in another order; 4e-6 was seen."""
FAMILIES = ("llama", "qwen3", "gemma2", "mixtral", "gpt_neox", "gpt2", "opt", "qwen2_1_kv_head")
LONGER = {
    2: ("gpt2", "gemma2", "mixtral", "qwen3"),
    3: ("gpt_neox", "opt", "qwen2_1_kv_head"),
    4: ("gpt2", "llama", "llama_2_kv_heads"),
}
"""The families of the longer checks, by ranks: packed, on the dimension of heads, whole with parts of gradients, in copies."""
ATTENTION = {
    "gpt_neox": "gpt_neox.layers.1.attention",
    "gpt2": "transformer.h.1.attn",
    "opt": "model.decoder.layers.1.self_attn",
}


@dataclass
class Pair:
    """A model in one process, and over the ranks."""

    name: str
    reference: nn.Module
    module: nn.Module
    view: ShardedView

    @cached_property
    def reached(self) -> set[tuple[str, str]]:
        """The inputs and outputs of modules that a forward runs."""
        return {key[:2] for key in collected(self.reference, None, boundaries(self.reference), forward)}

    @property
    def attention(self) -> str:
        return ATTENTION.get(self.name, "model.layers.1.self_attn")

    @property
    def layer(self) -> str:
        return self.attention.rpartition(".")[0]


pairs: dict[str, Pair] = {}


def families(rank) -> tuple[str, ...]:
    """All families that can be split over so many ranks."""
    return (*FAMILIES, "llama_2_kv_heads") if rank.world.size == 4 else FAMILIES


def pair(rank, name: str) -> Pair:
    """The models of a family, loaded once."""
    if name not in pairs:
        folder = saved(rank, name)
        module = load_parallel(folder, rank.world, rank.guard).module
        view = ShardedView(rank.world, module, module_tree(folder))
        pairs[name] = Pair(name, load(folder).module, module, view)
    return pairs[name]


def prompt() -> torch.Tensor:
    return torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(1))


@contextmanager
def visited(model: nn.Module, view: ShardedView | None, place: tuple[str, str], visit):
    """While this lasts, `visit` is given what stands at a place, whole, and gives what the model goes on with."""
    (path, side), (module, _, name) = place, place[0].partition(":")

    def changed(tree):
        if view is None or not view.sharded(path, side):
            return visit(tree)
        return view.own(path, side, visit(view.whole(path, side, tree)))

    def operation(_name, function, args, kwargs):
        if side == "input":
            args, kwargs = changed((args, kwargs))
            return function(*args, **kwargs)
        return changed(function(*args, **kwargs))

    part = model.get_submodule(module)
    if name:
        with instrumented(part, [name], operation):
            yield
    else:
        handle = (
            part.register_forward_pre_hook(lambda _, args, kwargs: changed((args, kwargs)), with_kwargs=True)
            if side == "input"
            else part.register_forward_hook(lambda _, _args, output: changed(output))
        )
        try:
            yield
        finally:
            handle.remove()


def tensors(tree) -> dict[str, torch.Tensor]:
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(tree)[0] if isinstance(leaf, torch.Tensor)}


def collected(model: nn.Module, view: ShardedView | None, places, run) -> dict:
    """Copies of all tensors that stand at some places in a run of the model, by place, call and name."""
    found: dict = {}

    def visit(tree, place):
        call = sum(key[:2] == place and key[3] == "" for key in found)
        found[*place, call, ""] = torch.zeros(())
        found.update({(*place, call, f"_{name}"): leaf.detach().clone() for name, leaf in tensors(tree).items()})
        return tree

    with ExitStack() as stack:
        for place in places:
            stack.enter_context(visited(model, view, place, partial(visit, place=place)))
        run(model)
    return found


def assert_near(expected: torch.Tensor, actual: torch.Tensor, what: object = "") -> None:
    assert expected.shape == actual.shape, (what, expected.shape, actual.shape)
    if expected.is_floating_point() and expected.numel():
        error, limit = (actual.double() - expected.double()).abs().max(), TOLERANCE * expected.double().abs().max()
        assert error <= limit, (what, error.item(), limit.item())
    else:
        assert torch.equal(expected, actual), what


def assert_all_near(expected: dict, actual: dict) -> None:
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert_near(tensor, actual[key], key)


def boundaries(model: nn.Module) -> list[tuple[str, str]]:
    return [(path, side) for path, _ in model.named_modules() for side in ("input", "output")]


def forward(model: nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=prompt(), **kwargs).logits


def sharded_in_layer(both: Pair) -> list[tuple[str, str]]:
    found = [place for place in boundaries(both.reference) if place in both.reached and both.view.sharded(*place)]
    return [place for place in found if place[0].startswith(f"{both.layer}.")]


def edited(tree):
    """A nested value in which every floating-point tensor is changed in columns, rows and heads of every rank."""

    def edit(_path, tensor):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            return tensor
        tensor, width = tensor.clone(), tensor.shape[-1]
        tensor[..., -1, [width // 5, width // 2, width - 1]] = 1.5
        if tensor.ndim > 3:
            tensor[:, -1] *= 0.5
            tensor[:, 0] *= 2.0
        return tensor

    return tree_map_with_path(edit, tree)


def results(model: nn.Module, embedded: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits without and with gradients, and the gradient of the embeddings."""
    with torch.no_grad():
        plain = model(inputs_embeds=embedded).logits
    embedded = embedded.clone().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    logits.square().mean().backward()
    return {"plain": plain, "logits": logits.detach(), "gradient": embedded.grad}


def assert_edits_agree(both: Pair, places) -> None:
    """The same edit at one place after another gives the results of one process."""
    embedded = both.reference.get_input_embeddings()(prompt()).detach()
    unchanged = results(both.reference, embedded)
    for place in places:
        with visited(both.reference, None, place, edited):
            expected = results(both.reference, embedded)
        with visited(both.module, both.view, place, edited):
            actual = results(both.module, embedded)
        assert not torch.equal(unchanged["plain"], expected["plain"]), place
        for name, tensor in expected.items():
            assert_near(tensor, actual[name], (both.name, place, name))


def gradients(both: Pair, view: ShardedView | None, place) -> dict[str, torch.Tensor]:
    """The gradient of each tensor at a place, and that of the embeddings when half of each row is left of the former."""
    model, found = both.module if view else both.reference, {}

    def follow(path, tensor):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            return tensor
        followed = tensor * 1 if tensor.requires_grad else tensor.detach().clone().requires_grad_()

        def halved(gradient):
            found[keystr(path)] = gradient.clone()
            return torch.cat([gradient[..., :1] * 3, gradient[..., 1:] / 2], -1)

        followed.register_hook(halved)
        return followed

    embedded = both.reference.get_input_embeddings()(prompt()).detach().requires_grad_()
    with visited(model, view, place, partial(tree_map_with_path, follow)):
        model(inputs_embeds=embedded).logits.square().mean().backward()
    return {**found, "embedded": embedded.grad}


def operated(model: nn.Module, view: ShardedView | None, path: str, names, run=forward) -> tuple[dict, set[str]]:
    """Copies of what operations of one forward get and give, whole; and what was refused."""
    found, refused = {}, set()

    def look(name, side, tree):
        try:
            seen = view.whole(f"{path}:{name}", side, tree) if view else tree
        except InvalidGraph as error:
            refused.add(error.what.partition(" cannot")[0].replace(f"the {side} of {path}:{name}", f"{name} {side}"))
        else:
            found.update({(name, side, key): leaf.detach().clone() for key, leaf in tensors(seen).items()})
        return tree

    def operation(name, function, args, kwargs):
        args, kwargs = look(name, "input", (args, kwargs))
        return look(name, "output", function(*args, **kwargs))

    with instrumented(model.get_submodule(path), names, operation):
        run(model)
    return found, refused


def names_in(model: nn.Module, path: str) -> list[str]:
    return [operation.name for operation in operations_of(model.get_submodule(path))]
