"""What a pool's owner allows: patterns, graphs, dumps, and what is wrong with a policy or factory itself."""

import pytest

from nnsight_hpc.daemon.policy import check_captures, check_graph, check_has_texts, spec_problems
from nnsight_hpc.graph import GraphBuilder, Ref, Source, TensorRef
from nnsight_hpc.wire.errors import Denied, InvalidInput
from nnsight_hpc.wire.messages import DumpSpec, ModelIdentity, decode
from nnsight_hpc.wire.pools import Policy, PoolSpec

LINE = Source("script.py", 7, "hidden = model.layers[3].output.save()")


def pool(factory=None, **policy):
    return PoolSpec(name="smol", model="m", policy=Policy(**policy), factory=factory)


def graph_of(*nodes):
    builder = GraphBuilder()
    forward = Ref(builder.add("model.forward", TensorRef("x")))
    for op, *args in nodes:
        builder.add(op, *([] if op == "model.parameter" else [forward]), *args, source=LINE)
    return builder.build({}, ModelIdentity(id="m"))


def allowed(spec, *nodes):
    try:
        check_graph(graph_of(*nodes), spec, "ada")
    except Denied:
        return False
    return True


@pytest.mark.parametrize(
    ("patterns", "module", "expected"),
    [
        (("*",), "", True),
        (("*",), "model.layers.3", True),
        ((), "model", False),
        (("model.layers",), "", False),
        (("model.layers",), "model", False),
        (("model.layers",), "model.layers", True),
        (("model.layers",), "model.layers.3.mlp.up_proj", True),
        (("model.layers",), "model.layers_more", False),
        (("model.layers.*.mlp",), "model.layers.3.mlp", True),
        (("model.layers.*.mlp",), "model.layers.3.mlp.up_proj", True),
        (("model.layers.*.mlp",), "model.layers.3", False),
        (("model.layers.*.mlp",), "model.layers.3.self_attn", False),
        (("model.layers.*.mlp",), "model.layers.3.4.mlp", False),
        (("*.layers",), "model.layers.3", True),
        (("*.layers",), "layers.3", False),
        (("lm_head", "model.norm"), "model.norm", True),
        (("model.layers.3",), "model.layers.3:attention_0", True),
        (("model.layers.3",), "model.layers.30:attention_0", False),
    ],
)
def test_patterns_stand_for_a_module_and_all_below_it(patterns, module, expected):
    """Each part is a name or any one part; `*` alone is the whole model; reads and sets have patterns of their own."""
    assert allowed(pool(read=patterns, set=()), ("model.output", module)) == expected
    assert allowed(pool(read=(), set=patterns), ("model.set_input", module, 0)) == expected


def test_without_a_policy_everything_is_allowed():
    """A pool without policy, and one whose policy says nothing, take every graph."""
    nodes = [("model.parameter", "a", "weight"), ("model.output", "a:f_0"), ("model.skip", "", 0), ("model.result",)]
    assert allowed(pool(), *nodes)
    assert allowed(PoolSpec(name="smol", model="m"), *nodes)


def test_weights_are_read_only_where_the_policy_says_so():
    """Neither as parameters nor among the arguments of operations inside of a forward; what is set there is no read."""
    spec = pool(parameters=False)
    assert not allowed(spec, ("model.parameter", "model.layers.3", "weight"))
    assert not allowed(spec, ("model.inputs", "model.layers.3:F_linear_0"))
    assert allowed(spec, ("model.set_output", "model.layers.3:F_linear_0", 0))
    assert allowed(spec, ("model.output", "model.layers.3"))


def test_parameters_are_those_of_modules_that_may_be_read():
    """A weight of a module that may not be read is not read, where weights may be."""
    spec = pool(read=("model",))
    assert allowed(spec, ("model.parameter", "model.embed_tokens", "weight"))
    assert not allowed(spec, ("model.parameter", "lm_head", "weight"))
    assert not allowed(spec, ("model.parameter", "", "lm_head.weight"))


def test_a_refusal_says_the_line_the_module_what_is_allowed_and_who_allows_it():
    """All problems of a graph are in one error."""
    spec = pool(read=("model.layers.*.mlp", "lm_head"), set=(), parameters=False)
    graph = graph_of(("model.output", "model.layers.3"), ("model.set_output", "lm_head", 0))
    with pytest.raises(Denied) as raised:
        check_graph(graph, spec, "ada")
    error = raised.value
    assert error.what == "the graph reads model.layers.3.output; the policy of pool smol does not allow that"
    assert error.where == str(LINE)
    assert error.why == (
        f"{LINE}: it sets lm_head.output\n"
        "ada allows model.layers.*.mlp, lm_head to be read, nothing to be set, and no weights to be read"
    )
    assert "ask ada" in error.next


def test_many_problems_are_shown_in_part():
    """Of a graph that touches everything twenty accesses are shown."""
    with pytest.raises(Denied) as raised:
        check_graph(graph_of(*[("model.output", f"layers.{n}") for n in range(100)]), pool(read=()), "ada")
    assert raised.value.why.splitlines()[18:20] == [f"{LINE}: it reads layers.19.output", "and more"]


@pytest.mark.parametrize(
    ("read", "capture", "expected"),
    [
        (("*",), "model.layers.*.output", True),
        (("*",), "output", True),
        (("model",), "output", False),
        (("model.layers.*",), "model.layers.*.output", True),
        (("model.layers.*",), "model.layers.3.mlp.input", True),
        (("model.layers.3", "model.layers.4"), "model.layers.3.output", True),
        (("model.layers.3", "model.layers.4"), "model.layers.*.output", False),
        (("model.layers.3",), "model.layers.3*.output", False),
        (("model.layers.*.mlp",), "model.layers.*.output", False),
        (("model.layers.*.mlp",), "model.*.*.mlp.output", False),
    ],
)
def test_captures_of_dumps_are_reads(read, capture, expected):
    """A `*` of a capture stands for any module there is, and needs one in the policy."""
    dump = DumpSpec(name="d", captures=("lm_head.output", capture))
    spec = pool(read=(*read, "lm_head"))
    if expected:
        check_captures(dump, spec, "ada")
        return
    with pytest.raises(Denied) as raised:
        check_captures(dump, spec, "ada")
    assert raised.value.what == f"the dump reads {capture}; the policy of pool smol does not allow that"
    assert "ada allows" in raised.value.why


def test_a_module_of_the_owners_own_takes_no_texts():
    """A dump of texts on a pool with a factory is refused before it is queued, with what to do instead."""
    with pytest.raises(InvalidInput, match="cannot write datasets of texts") as raised:
        check_has_texts(pool(factory="lab:net"))
    assert "NNsight(module)" in raised.value.next


@pytest.mark.parametrize("pattern", ["", "model..layers", "model.lay*", "**", "model.layers[3]", ".model", "a b", "ä"])
def test_patterns_that_could_be_misread_are_refused(pattern):
    """What is not names and stars between dots is no pattern: half a name with a star would silently allow nothing."""
    [problem] = spec_problems(pool(read=(pattern,)))
    assert repr(pattern) in problem


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"policy": Policy(result_bytes=0)}, "result_bytes = 0"),
        ({"factory": "lab"}, "must be package:function"),
        ({"factory": "lab:net()"}, "must be package:function"),
        ({"factory": "lab:net", "tp": 2}, "held by one rank"),
        ({"factory": "lab:net", "replicated": True}, "held by one rank"),
        ({"factory": "lab:net", "revision": "main"}, "no revision"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(fields, expected):
    """A policy or factory that makes no sense is one of the problems of the pool's description."""
    [problem] = spec_problems(PoolSpec(name="p", model="m", **fields))
    assert expected in problem


def test_a_factory_and_policy_as_they_should_be_are_no_problem():
    """Dotted packages and names, patterns with stars, any positive size."""
    policy = Policy(read=("model.layers.*.mlp", "lm_head"), set=(), parameters=False, result_bytes=1)
    assert list(spec_problems(PoolSpec(name="p", model="m", factory="lab.models:Made.net", policy=policy))) == []


def test_a_policy_with_a_key_that_nobody_knows_is_refused():
    """A word misspelt in a policy is no policy: it would allow what it is to forbid."""
    with pytest.raises(InvalidInput, match="parametres"):
        decode(b'{"name": "p", "model": "m", "policy": {"parametres": false}}', PoolSpec)
