"""The oracle: what plain PyTorch hooks see and change. It knows nothing of the project that it checks.

``changed`` installs hooks that change values, ``seen`` runs something and tells what stood at every module at each call.
"""

import weakref
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def copied(value, device=None):
    """A nested value with clones of its tensors (on `device`, if it is given), so that later writes do not reach it."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: copied(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item, device) for item in value)
    return value


def first(args, kwargs):
    """A module's input: its first positional argument, or else its first keyword's value."""
    return args[0] if args else next(iter(kwargs.values()))


def hooks_of(module):
    """The names of modules that have any hook, or a forward that is not their class's."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    touched = [each for each in module.modules() if "forward" in vars(each) or any(getattr(each, t) for t in tables)]
    return [name for name, each in module.named_modules() if each in touched]


@contextmanager
def output_hook(module, path, change):
    """While active, `change(output, call)` replaces the output of the module at `path`; None: as it is (or in place)."""
    calls = iter(range(10**6))
    handle = module.get_submodule(path).register_forward_hook(lambda _m, _i, output: change(output, next(calls)))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def input_hook(module, path, change):
    """While active, `change(input, call)` replaces the first argument of the module at `path`."""
    calls = iter(range(10**6))

    def hook(_module, args, kwargs):
        new = change(first(args, kwargs), next(calls))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})

    handle = module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def changed(module, outputs=None, inputs=None):
    """Hooks by path: `outputs` and `inputs` have functions of a value that return the new one, or None."""
    with ExitStack() as stack:
        for path, change in (outputs or {}).items():
            stack.enter_context(output_hook(module, path, lambda value, _call, change=change: change(value)))
        for path, change in (inputs or {}).items():
            stack.enter_context(input_hook(module, path, lambda value, _call, change=change: change(value)))
        yield


class Seen:
    """What stood at the modules: for each path a list over its calls, and the order in which modules began."""

    def __init__(self):
        self.outputs, self.inputs, self.order = defaultdict(list), defaultdict(list), []

    def output(self, path, call=0):
        return self.outputs[path][call]

    def input(self, path, call=0):
        return first(*self.inputs[path][call])

    def inside(self, path, kind="output"):
        """The modules in the one at `path`, in their order, whose `kind` is a tensor of floats."""
        values = {name: getattr(self, kind)(name) for name in dict.fromkeys(self.order) if name.startswith(f"{path}.")}
        return [name for name, v in values.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]


@contextmanager
def seeing(module, device=None):
    """While active, what stands at every module is copied (to `device`, if it is given) into the `Seen` that it gives."""
    seen = Seen()

    def before(path):
        def hook(_module, args, kwargs):
            seen.order.append(path)
            seen.inputs[path].append(copied((args, kwargs), device))

        return hook

    def after(path):
        return lambda _module, _args, output: seen.outputs[path].append(copied(output, device))

    handles = []
    for path, each in module.named_modules():
        handles.append(each.register_forward_pre_hook(before(path), with_kwargs=True))
        handles.append(each.register_forward_hook(after(path)))
    try:
        with torch.no_grad():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forward_of(module, path, function):
    """While active, the module at `path` runs `function(original forward, *args, **kwargs)` instead."""
    part = module.get_submodule(path)
    original, forward = part.__dict__.get("forward"), part.forward
    part.forward = wraps(forward)(lambda *args, **kwargs: function(forward, *args, **kwargs))
    try:
        yield
    finally:
        if original is None:
            del part.forward
        else:
            part.forward = original


counters = []
"""The lists that note which modules run, just now; who runs the model elsewhere adds to them what ran there."""


@contextmanager
def counting(module):
    """While active, the paths of the modules whose forward really runs are noted, in order; no hook is used.

    The classes' forwards are wrapped and look which module of this model they run for, so that the modules themselves
    stay as they are, and copies of them (for fake tensors) do not count. A module that has a forward of its own (those
    that transformers splits over ranks have) gets that one wrapped.
    """
    ran, paths = [], {id(each): path for path, each in module.named_modules()}

    def counted(cls, forward):
        @wraps(forward)
        def run(self, *args, **kwargs):
            if type(self) is cls and id(self) in paths:
                ran.append(paths[id(self)])
            return forward(self, *args, **kwargs)

        return run

    def counted_own(path, forward):
        @wraps(forward)
        def run(*args, **kwargs):
            ran.append(path)
            return forward(*args, **kwargs)

        return run

    with ExitStack() as stack:
        for cls in {type(each) for each in module.modules()}:
            stack.enter_context(mock.patch.object(cls, "forward", counted(cls, cls.forward)))
        for path, each in module.named_modules():
            if "forward" in vars(each):
                stack.enter_context(mock.patch.object(each, "forward", counted_own(path, each.forward)))
        counters.append(ran)
        stack.callback(counters.pop)
        yield ran


class Live(TorchDispatchMode):
    """While active, how many bytes the tensors that operations made hold at once: `peak`, whatever holds them."""

    def __init__(self):
        super().__init__()
        self._made, self.peak = weakref.WeakSet(), 0

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._made.update(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._made}
        self.peak = max(self.peak, sum(memory.values()))
        return result
