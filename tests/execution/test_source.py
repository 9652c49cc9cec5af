"""Instrumented forwards: the same results bit for bit, and what callbacks see and change is what patched functions do."""

import functools
import inspect
import signal
import traceback
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn
from transformers import modeling_utils
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from nnsight_hpc.execution.source import instrumented, operations_of, source_of
from nnsight_hpc.wire.errors import InvalidGraph
from tests.oracle.architectures import ARCHITECTURES, LANGUAGE, make
from tests.oracle.hooks import counting

IDS = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(2))
ATTENTION = {"llama": ("model.layers.1.self_attn", modeling_llama), "gpt2": ("transformer.h.1.attn", modeling_gpt2)}


def plain(_name, function, args, kwargs):
    return function(*args, **kwargs)


class Seen:
    """A callback that keeps what operations got and gave, and may change it."""

    def __init__(self, change=lambda output: output):
        self.inputs, self.outputs, self._change = [], [], change

    def __call__(self, name, function, args, kwargs):
        self.inputs.append((name, args, kwargs))
        output = self._change(function(*args, **kwargs))
        self.outputs.append((name, output))
        return output

    @property
    def names(self):
        return [name for name, _ in self.outputs]


def names_of(module, nested=()):
    return [operation.name for operation in operations_of(module, nested)]


def names_at_all_depths(module, depth=2, nested=()):
    """All operations of a forward, and of the Python functions that they call, that can be told without a run."""
    found = []
    for name in names_of(module, nested):
        found.append(":".join([*nested, name]))
        if depth > 1:
            try:
                found += names_at_all_depths(module, depth - 1, (*nested, name))
            except InvalidGraph:
                continue
    return found


@contextmanager
def all_instrumented(module, callback=plain, depth=2):
    with ExitStack() as stack:
        for path, each in module.named_modules():
            if "_forward_unimplemented" in each.forward.__qualname__:
                continue  # a list of modules is never called
            prefixed = functools.partial(_prefixed, callback, path)
            stack.enter_context(instrumented(each, names_at_all_depths(each, depth), prefixed))
        yield


def _prefixed(callback, path, name, *call):
    return callback(f"{path}:{name}", *call)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_operations_of_all_modules_leave_the_logits_as_they_are(architecture):
    """Every operation of every module, and of the functions that they call, handed on: bit for bit the same logits."""
    subject, seen = make(architecture), Seen()
    inputs = subject.inputs()
    with counting(subject.module) as ran:
        expected = subject.logits(inputs)
    with all_instrumented(subject.module, seen):
        got = subject.logits(inputs)
    assert torch.equal(got, expected)
    assert {name.split(":")[0] for name in seen.names} == set(ran)
    assert [each for each in subject.module.modules() if "forward" in vars(each)] == []


@pytest.mark.parametrize("architecture", LANGUAGE)
def test_generation_with_all_operations_gives_the_same_tokens(architecture):
    """Forwards with a cache take other branches; the tokens and their scores are the same."""
    module = make(architecture).module
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = module.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    with all_instrumented(module, depth=1):
        got = module.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))


def test_gradients_are_the_same():
    """Backward through instrumented forwards in training mode gives bit for bit the same gradients."""
    module = make("llama").module.train().requires_grad_()

    def gradients():
        module.zero_grad()
        module(IDS).logits.square().sum().backward()
        return [parameter.grad.clone() for parameter in module.parameters()]

    expected = gradients()
    with all_instrumented(module):
        assert all(map(torch.equal, gradients(), expected))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_operations_are_the_same_on_the_meta_device(architecture):
    """A module tree without weights lists the same operations."""
    with torch.device("meta"):
        hollow = ARCHITECTURES[architecture].make()
    module = make(architecture).module
    for (path, mine), its in zip(module.named_modules(), hollow.modules(), strict=True):
        if "_forward_unimplemented" not in mine.forward.__qualname__:
            assert operations_of(its) == operations_of(mine), path
    attention = ARCHITECTURES[architecture].attention
    if attention:
        path, nested = attention.format(0), ["attention_interface_0"]
        listed = operations_of(hollow.get_submodule(path), nested)
        assert listed == operations_of(module.get_submodule(path), nested)
        assert len(listed) > 5


def patched_attention(monkeypatch, modeling, implementation, attention, function):
    """The oracle: the library's own attention function replaced by one that hands it to `function` for one module."""
    registry = modeling_utils.ALL_ATTENTION_FUNCTIONS
    real = modeling.eager_attention_forward if implementation == "eager" else registry["sdpa"]

    def patched(module, *args, **kwargs):
        return function(real, module, *args, **kwargs) if module is attention else real(module, *args, **kwargs)

    if implementation == "eager":
        monkeypatch.setattr(modeling, "eager_attention_forward", patched)
    else:
        monkeypatch.setitem(registry._local_mapping, "sdpa", patched)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ATTENTION)
def test_attention_sees_what_a_patched_function_sees(architecture, implementation, monkeypatch):
    """Arguments and output of `attention_interface_0` are those that pass through the library's attention function."""
    path, modeling = ATTENTION[architecture]
    module, expected, seen = make(architecture).module, [], Seen()
    module.set_attn_implementation(implementation)
    attention = module.get_submodule(path)
    with instrumented(attention, ["attention_interface_0"], seen):
        module(IDS)

    def kept(real, *args, **kwargs):
        expected.append((args, kwargs, real(*args, **kwargs)))
        return expected[0][2]

    patched_attention(monkeypatch, modeling, implementation, attention, kept)
    module(IDS)
    ((_, args, kwargs),), ((_, output),), ((its_args, its_kwargs, its_output),) = seen.inputs, seen.outputs, expected
    assert args[0] is its_args[0] is attention
    assert len(args) == len(its_args)
    assert all(torch.equal(a, b) for a, b in zip(args[1:4], its_args[1:4], strict=True))
    assert kwargs.keys() == its_kwargs.keys()
    assert torch.equal(output[0], its_output[0])
    assert output[0].shape == (2, 5, module.config.num_attention_heads, attention.head_dim)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ATTENTION)
def test_changed_attention_changes_the_logits_as_a_patched_function_does(architecture, implementation, monkeypatch):
    """Another query going in and another output coming out give the logits of an attention function that does that."""
    path, modeling = ATTENTION[architecture]
    module = make(architecture).module
    module.set_attn_implementation(implementation)
    attention, plain_logits = module.get_submodule(path), module(IDS).logits

    def changed(real, module, query, *args, **kwargs):
        output, weights = real(module, query.flip(-1), *args, **kwargs)
        return output * 2 - 1, weights

    with instrumented(
        attention, ["attention_interface_0"], lambda _n, function, args, kwargs: changed(function, *args, **kwargs)
    ):
        got = module(IDS).logits
    patched_attention(monkeypatch, modeling, implementation, attention, changed)
    assert torch.equal(got, module(IDS).logits)
    assert not torch.allclose(got, plain_logits)


@pytest.mark.parametrize(
    ("architecture", "implementation", "nested", "patched"),
    [
        ("llama", "sdpa", "torch_nn_functional_scaled_dot_product_attention_0", "scaled_dot_product_attention"),
        ("gpt2", "sdpa", "torch_nn_functional_scaled_dot_product_attention_0", "scaled_dot_product_attention"),
        ("llama", "eager", "nn_functional_softmax_0", "softmax"),
        ("gpt2", "eager", "nn_functional_softmax_0", "softmax"),
    ],
)
def test_nested_operation_sees_and_changes_what_a_patched_function_does(
    architecture, implementation, nested, patched, monkeypatch
):
    """An operation inside the attention function, against torch's own function patched; other layers are not touched."""
    path, _ = ATTENTION[architecture]
    module = make(architecture).module
    module.set_attn_implementation(implementation)
    attention, seen = module.get_submodule(path), Seen(lambda output: output * 0.5)
    with instrumented(attention, [f"attention_interface_0:{nested}"], seen):
        got = module(IDS).logits
    real, calls = getattr(torch.nn.functional, patched), []

    def halved_in_layer_1(*args, **kwargs):
        calls.append(args)
        output = real(*args, **kwargs)
        return output * 0.5 if len(calls) == 2 else output

    monkeypatch.setattr(torch.nn.functional, patched, halved_in_layer_1)
    expected = module(IDS).logits
    assert torch.equal(got, expected)
    assert len(calls) == 4
    ((name, args, _),) = seen.inputs
    assert name == f"attention_interface_0:{nested}"
    assert all(torch.equal(mine, its) for mine, its in zip(args, calls[1], strict=True))


def test_experts_are_listed_as_they_are_looked_up():
    """Mixtral's experts have a decorator that looks their function up; the function that runs is one step further in."""
    subject = make("mixtral")
    experts = subject.module.get_submodule("model.layers.1.mlp.experts")
    assert names_of(experts) == ["experts_interface_get_interface_0", "experts_forward_0"]
    inside = names_of(experts, ["experts_forward_0"])
    seen = Seen()
    with instrumented(experts, [f"experts_forward_0:{name}" for name in inside], seen):
        subject.module(IDS)
    assert len(seen.names) > 5
    subject.module.set_experts_implementation("eager")
    assert "self_act_fn_0" in names_of(experts, ["experts_forward_0"])
    assert names_of(experts, ["experts_forward_0"]) != inside


class Repeated(nn.Module):
    """A forward with a loop, a branch, and an operation that is called several times."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x, times=3):
        for _ in range(times):
            x = torch.sin(self.linear(x))
        return x.abs() if times > 5 else x


@pytest.fixture
def repeated():
    torch.manual_seed(0)
    return Repeated().requires_grad_(False)


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def test_operation_in_a_loop_is_met_at_each_pass(repeated):
    """Each pass of a loop is a call of its operations; the n-th can be changed alone."""
    calls = iter(range(3))

    def second_doubled(_name, function, args, kwargs):
        return function(*args, **kwargs) * (2 if next(calls) == 1 else 1)

    with instrumented(repeated, ["torch_sin_0"], second_doubled):
        got = repeated(X)
    first = torch.sin(repeated.linear(X))
    assert torch.equal(got, torch.sin(repeated.linear(torch.sin(repeated.linear(first)) * 2)))
    assert next(calls, None) is None


def test_module_that_is_called_twice_meets_its_operations_twice(repeated):
    """A context lasts for all calls of the module within it, whatever their arguments."""
    seen = Seen()
    model = nn.Sequential(repeated, repeated)
    with instrumented(repeated, ["torch_sin_0", "x_abs_0"], seen):
        model(X)
        repeated(X, times=6)
    assert seen.names == ["torch_sin_0"] * 12 + ["x_abs_0"]


def test_operation_need_not_run(repeated):
    """A callback that gives an output of its own skips the operation."""
    ran = []
    repeated.linear.register_forward_hook(lambda *_: ran.append(1))
    with instrumented(repeated, ["self_linear_0"], lambda _n, _f, args, _k: args[0] + 1):
        got = repeated(X, times=1)
    assert torch.equal(got, torch.sin(X + 1))
    assert ran == []


def test_assignment_is_seen_and_changed(repeated):
    """What is assigned can be replaced before it is used."""
    with instrumented(repeated, ["x_0"], lambda _n, function, args, kwargs: function(*args, **kwargs) * 0):
        assert torch.equal(repeated(X), torch.zeros(2, 4))


def test_only_the_named_operations_are_rewritten(repeated):
    """Nothing stands between the forward and an operation that is not named."""
    callers = []
    repeated.linear.register_forward_hook(lambda *_: callers.append([f.name for f in traceback.extract_stack()[:-1]]))
    with instrumented(repeated, ["torch_sin_0"], plain):
        repeated(X, times=1)
    with instrumented(repeated, ["self_linear_0"], plain):
        repeated(X, times=1)
    between = [names[len(names) - names[::-1].index("forward") :] for names in callers]
    assert all(name in {"_wrapped_call_impl", "_call_impl", "inner"} for name in between[0])
    assert "plain" in between[1]


@pytest.mark.parametrize("own", [False, True], ids=["the class's", "the instance's own"])
def test_forward_is_put_back(repeated, own):
    """Afterwards the module has the forward that it had, also when it was an attribute of the instance."""
    if own:
        repeated.forward = functools.partial(Repeated.forward, repeated, times=1)
    before = dict(vars(repeated))
    with instrumented(repeated, ["torch_sin_0"], plain):
        assert vars(repeated)["forward"] is not before.get("forward")
        repeated(X)
    assert vars(repeated) == before


def test_forward_is_put_back_after_an_error(repeated):
    """An error in a callback goes out through the forward as it is, and nothing stays on the module."""

    def fail(*_):
        raise ZeroDivisionError("in the callback")

    with pytest.raises(ZeroDivisionError, match="in the callback"), instrumented(repeated, ["torch_sin_0"], fail):
        repeated(X)
    assert "forward" not in vars(repeated)


def test_forward_is_put_back_after_ctrl_c(repeated):
    """So it is when the program is interrupted inside an operation."""

    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), instrumented(repeated, ["torch_sin_0"], interrupt):
        repeated(X)
    assert "forward" not in vars(repeated)


def test_error_shows_the_line_of_the_forward(repeated):
    """A traceback through an instrumented forward names the file and the line that the forward has."""
    with instrumented(repeated, names_of(repeated), plain), pytest.raises(RuntimeError) as caught:
        repeated(torch.ones(3, 3))
    frame = next(frame for frame in traceback.extract_tb(caught.tb) if frame.name == "forward")
    lines, first = inspect.getsourcelines(Repeated.forward)
    assert (frame.filename, frame.line) == (__file__, "x = torch.sin(self.linear(x))")
    assert lines[frame.lineno - first].strip() == frame.line


def test_signature_is_kept(repeated):
    """Libraries that look at a forward's parameters see those of the original."""
    expected = inspect.signature(repeated.forward)
    with instrumented(repeated, ["torch_sin_0"], plain):
        assert inspect.signature(repeated.forward) == expected


FACTOR = 2


class Base(nn.Module):
    def forward(self, x):
        return x * 3


def _made_in_a_function(shift):
    def announced(function):
        @functools.wraps(function)
        def wrapper(self, *args, **kwargs):
            self.announced = function.__name__
            return function(self, *args, **kwargs) + 100

        return wrapper

    class Inside(Base):
        """Uses what a function may reach from where it stands."""

        def __init__(self):
            super().__init__()
            self.__private = 5

        @torch.no_grad()
        @announced
        def forward(self, x, *rest, plus=7, **more):
            global FACTOR  # noqa: PLW0603 - what is under test
            self.found = __class__
            total = super().forward(x) + self.__hidden(abs(2)) + shift
            total = total + sum(abs(each) for each in rest) + plus + more.get("last", 0)
            if (n := max(1, FACTOR)) > 1:
                total = total * n
            try:
                raise ValueError(f"{abs(-1)}")  # noqa: TRY301 - under test, too
            except ValueError as error:
                total = total + int(str(error))
            FACTOR = max(FACTOR, 2)

            def doubled(value, times=abs(2)):  # noqa: B008 - under test, too
                return torch.mul(value, times)

            return doubled(total)

        def __hidden(self, __times):  # noqa: PYI063 - a private name
            return self.__private * __times

    return Inside()


def test_forward_reaches_all_that_it_could():
    """`super()`, `__class__`, private names, closure, globals, defaults, nested functions and decorators work."""
    module = _made_in_a_function(shift=11)
    parameter = nn.Parameter(X.clone())
    expected = module(parameter, -4, -5, last=1)
    seen = Seen()
    with instrumented(module, names_of(module), seen):
        got = module(parameter, -4, -5, last=1)
        assert module(parameter).grad_fn is None
    assert torch.equal(got, expected)
    assert module.announced == "forward"
    assert module.found is type(module)
    assert {"forward_0", "self___hidden_0", "torch_mul_0", "doubled_0", "abs_3"} <= set(seen.names)


def test_globals_are_the_modules_own(monkeypatch):
    """A global that is patched while a forward is instrumented is patched for it, too."""
    module = _made_in_a_function(shift=0)
    with instrumented(module, ["doubled_0"], plain):
        before = module(X)
        monkeypatch.setitem(globals(), "FACTOR", 3)
        assert not torch.equal(module(X), before)


def test_bound_methods_partials_and_callable_objects_are_seen_into():
    """What an operation calls may be a method, a partial, or an object with a `__call__`; a local function, too."""

    class Doubler:
        def __call__(self, x):
            return torch.add(x, x)

    class Calls(nn.Module):
        def method(self, x):
            return torch.sin(x)

        def forward(self, x):
            def local(x):
                return x.cos()

            doubler, part = Doubler(), functools.partial(self.method)
            return doubler(x) + part(x) + self.method(x) + local(x)

    module, seen = Calls(), Seen()
    names = ["doubler_0:torch_add_0", "part_0:torch_sin_0", "self_method_0:torch_sin_0", "local_0:x_cos_0"]
    expected = module(X)
    with instrumented(module, names, seen):
        assert torch.equal(module(X), expected)
    assert seen.names == names
    assert source_of(module, ["local_0"]) is None
    with pytest.raises(InvalidGraph, match="what local_0 calls is not known yet"):
        operations_of(module, ["local_0"])
    with instrumented(module, ["local_0:x_sin_0"], plain), pytest.raises(InvalidGraph, match=r"mean x_cos_0\?"):
        module(X)


def test_recursive_function_is_seen_into_at_its_first_depth():
    """A function that calls itself by its global name goes on with itself as it was."""

    class Calls(nn.Module):
        def forward(self, x):
            return _power(x, 3)

    module, seen = Calls(), Seen()
    with instrumented(module, ["_power_0:_power_0"], seen):
        assert torch.equal(module(X), X**3)
    assert seen.names == ["_power_0:_power_0"]


def _power(x, n):
    return x if n == 1 else x * _power(x, n - 1)


@pytest.mark.parametrize(
    ("module", "nested", "message"),
    [
        (
            "model.layers.0.self_attn",
            ["attention_interface_1"],
            r"forward has no operation[\s\S]*mean attention_interface_0\?",
        ),
        ("model.layers.0.self_attn", ["self_q_proj_0"], r"calls a module, Linear[\s\S]*source of their own"),
        ("model.layers.0.self_attn", ["hidden_shape_0"], "is an assignment: it calls nothing"),
        (
            "model.layers.0.mlp.gate_proj",
            ["F_linear_0"],
            "linear has no source that can be read[^$]*not written in Python",
        ),
        ("", ["CausalLMOutputWithPast_0"], "CausalLMOutputWithPast has no source that can be read[^$]*it is a class"),
    ],
)
def test_what_has_no_operations_is_refused(module, nested, message):
    """The error says what stands there instead, before anything runs."""
    part = make("llama").module.get_submodule(module)
    with pytest.raises(InvalidGraph, match=message):
        operations_of(part, nested)
    name = ":".join([*nested, "x_0"] if "_1" not in nested[0] else nested)
    with pytest.raises(InvalidGraph, match=message), instrumented(part, [name], plain):
        pass
    assert "forward" not in vars(part)


def test_forward_without_source_is_refused():
    """A forward that is not written in Python, or not in a file, cannot be listed."""
    module = nn.Identity()
    module.forward = torch.sin
    with pytest.raises(InvalidGraph, match="sin has no source that can be read"):
        operations_of(module)
    assert operations_of(nn.ModuleList()) == operations_of(nn.Module())  # that of torch, which raises


def test_second_context_on_a_module_is_refused(repeated):
    """One context names all operations of a module; a second one would silently take the first one's place."""
    with instrumented(repeated, ["torch_sin_0"], plain):
        with pytest.raises(InvalidGraph, match="handed on already"), instrumented(repeated, ["self_linear_0"], plain):
            pass
        assert torch.equal(repeated(X), type(repeated).forward(repeated, X))


class Looks(nn.Module):
    def forward(self, x, mode="sin"):
        found = getattr(torch, mode)
        return found(x, out=None)


@pytest.mark.parametrize(
    "change",
    [
        lambda _n, function, args, _k: function(args[0], "load"),
        lambda _n, _f, args, _k: args[0].load,
        lambda _n, _f, _args, _k: print,
        lambda _n, function, args, _k: function(torch.Tensor, args[1]),
    ],
    ids=["string", "attribute", "function", "class"],
)
def test_only_data_can_be_replaced(change):
    """Strings, functions and objects choose which code runs: an operation that gets others is refused."""
    module = Looks()
    with (
        instrumented(module, ["getattr_0"], change),
        pytest.raises(InvalidGraph, match="cannot be set at the operation getattr_0"),
    ):
        module(X)


def test_data_beside_objects_can_be_replaced():
    """Tensors, numbers and None may change among arguments that stay as they are, equal strings included."""
    module = Looks()

    def change(name, function, args, kwargs):
        if name == "getattr_0":
            return function(args[0], f"{args[1]}"[:].casefold())
        return function(args[0] * 2, out=None)

    with instrumented(module, ["getattr_0", "found_0"], change):
        assert torch.equal(module(X), torch.sin(X * 2))


def test_hooks_of_accelerate_stay_around_the_forward(repeated):
    """Where accelerate has put its hook in the forward's place, the forward below it is instrumented, and the hook runs."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Doubled(ModelHook):
        def post_forward(self, module, output):
            return output * 2

    expected, seen = repeated(X) * 2, Seen()
    add_hook_to_module(repeated, Doubled())
    before = dict(vars(repeated))
    with instrumented(repeated, names_of(repeated), seen):
        assert torch.equal(repeated(X), expected)
    assert vars(repeated) == before
    assert seen.names.count("torch_sin_0") == 3
    remove_hook_from_module(repeated)
