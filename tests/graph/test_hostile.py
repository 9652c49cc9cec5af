"""Documents that somebody might send to a worker to do more than arithmetic: each is refused, and the message says what."""

import json
import re

import pytest

from nnsight_hpc.graph import Graph, validate
from nnsight_hpc.graph.nodes import Node
from nnsight_hpc.wire.errors import InvalidGraph

FORWARD = {"id": 0, "op": "model.forward", "args": [{"tensor": "x"}]}
HIDDEN = {"id": 1, "op": "model.output", "args": [{"ref": 0}, "layers.0"]}
V = {"ref": 1}


def _document(*nodes, **changes):
    whole = {
        "format": "nnsight-hpc/graph",
        "version": 1,
        "model": {"id": "m"},
        "kind": "trace",
        "nodes": [FORWARD, HIDDEN, *({"id": 2 + i, **node} for i, node in enumerate(nodes))],
        "saves": {},
    }
    return json.dumps({**whole, **changes})


def _refusal(document):
    with pytest.raises(InvalidGraph) as caught:
        validate(Graph.from_json(document))
    return str(caught.value)


def test_harmless_document_is_taken():
    """The frame that all documents here stand in is fine by itself, so that what is refused is what they add."""
    validate(
        Graph.from_json(
            _document({"op": "torch.sum", "args": [V]}, {"op": "save", "args": [{"ref": 2}]}, saves={"s": 3})
        )
    )


# One operation that may not run, with its arguments; the message names it.
OPERATIONS = {
    # code
    "eval": ("builtins.eval", "__import__('os').system('id')"),
    "exec": ("builtins.exec", "1"),
    "import": ("importlib.import_module", "os"),
    "compile": ("torch.compile", V),
    "hub": ("torch.hub.load", "evil/repo", "model"),
    "jit": ("torch.jit.load", "/tmp/evil.pt"),
    "jit code": ("torch.import_ir_module", "/tmp/evil"),
    "custom operator": ("torch.ops.load_library", "/tmp/evil.so"),
    "C++ extension": ("torch.utils.cpp_extension.load", "evil", "evil.cpp"),
    "call": ("operator.call", V),
    "getter of attributes": ("operator.attrgetter", "__class__.__mro__"),
    "caller of methods": ("operator.methodcaller", "__reduce__"),
    "numpy": ("numpy.load", "/tmp/evil.npy"),
    "dotted walk": ("torch.nn.functional.torch.os.system", "id"),
    "dotted walk to linalg": ("torch.linalg.torch.load", "/tmp/evil"),
    "module of torch": ("torch.os", "id"),
    "class of torch": ("torch.Generator", "cuda"),
    "method of a class": ("Tensor.new", 3),
    "dunder": ("Tensor.__class__", V),
    "dunder of the module": ("torch.__builtins__", V),
    "reduce": ("Tensor.__reduce_ex__", V, 2),
    "bound to self": ("operator.__import__", "os"),
    "empty name": ("", V),
    "only a namespace": ("torch", V),
    "space in the name": ("torch.add ", V, V),
    "name that looks allowed": ("torch.аdd", V, V),  # noqa: RUF001 - the Cyrillic letter is the point
    "newline in the name": ("torch.add\n", V, V),
    # pickles and files
    "pickle": ("pickle.loads", "gASV"),
    "torch.load": ("torch.load", "/home/other/secret.pt"),
    "torch.save": ("torch.save", V, "/home/other/.bashrc"),
    "file as memory": ("torch.from_file", "/etc/passwd", True, 100),
    "open": ("builtins.open", "/etc/passwd"),
    "numpy file": ("Tensor.tofile", V, "/tmp/x"),
    "print": ("builtins.print", V),
    # environment and processes
    "system": ("os.system", "id"),
    "environment": ("os.getenv", "SECRET"),
    "process": ("subprocess.run", ["id"]),
    "threads": ("torch.set_num_threads", 1000),
    "network": ("torch.distributed.init_process_group", "nccl"),
    # callbacks
    "elementwise callback": ("Tensor.apply_", V, "print"),
    "map": ("Tensor.map_", V, V, "print"),
    "hook": ("Tensor.register_hook", V, "print"),
    "vmap": ("torch.vmap", "print"),
    "cond": ("torch.cond", V, "print", "print"),
    "loss with a callback": ("torch.nn.functional.triplet_margin_with_distance_loss", V, V, V),
    "local function": ("local.apply", 0, V),
    # memory
    "pointer": ("Tensor.data_ptr", V),
    "storage": ("Tensor.untyped_storage", V),
    "old storage": ("Tensor.storage", V),
    "other memory": ("Tensor.set_", V, V),
    "past the end": ("Tensor.as_strided", V, [1000], [1], 10**9),
    "past the end, copied": ("torch.as_strided_copy", V, [1000], [1]),
    "capsule": ("torch.from_dlpack", V),
    "numpy memory": ("Tensor.numpy", V),
    "buffer": ("torch.frombuffer", "abc"),
    "uninitialised": ("torch.empty", [1000]),
    "uninitialised, by method": ("Tensor.new_empty", V, [1000]),
    "shared": ("Tensor.share_memory_", V),
    "resize": ("Tensor.resize_", V, [10**9]),
    "resize as": ("Tensor.resize_as_", V, V),
    "unchecked offsets": ("torch.nn.functional.embedding_bag", V, V, V),
    "unchecked pivots": ("torch.linalg.lu_solve", V, V, V),
    "unchecked split": ("torch.unsafe_split", V, 2),
    # the state of the process
    "seed": ("torch.manual_seed", 0),
    "state of the generator": ("torch.set_rng_state", V),
    "default device": ("torch.set_default_device", "cuda"),
    "default dtype": ("torch.set_default_dtype", {"dtype": "float16"}),
    "gradients": ("torch.set_grad_enabled", True),
    "printing": ("torch.set_printoptions", 10),
    "determinism": ("torch.use_deterministic_algorithms", True),
    "empty cache": ("torch.cuda.empty_cache",),
    # random numbers
    "dropout": ("torch.nn.functional.dropout", V),
    "gumbel": ("torch.nn.functional.gumbel_softmax", V),
    "no seed": ("torch.randn", [3]),
    "no seed, in place": ("Tensor.normal_", V),
}


@pytest.mark.parametrize(("op", "args"), [(op, args) for op, *args in OPERATIONS.values()], ids=OPERATIONS.keys())
def test_operation_is_refused_by_its_name(op, args):
    """What is not on the list does not run, whatever its arguments are."""
    assert f"({repr(op)[1:-1]})" in _refusal(_document({"op": op, "args": args}))


# An operation that may run, with arguments that it may not have.
ARGUMENTS = {
    "out": ({"op": "torch.add", "args": [V, V], "kwargs": {"out": V}}, "torch.add.*keyword 'out'"),
    "out by position": ({"op": "torch.norm", "args": [V, 2, None, False, V]}, "torch.norm.*positional"),
    "inplace": ({"op": "torch.nn.functional.relu", "args": [V], "kwargs": {"inplace": True}}, "'inplace'"),
    "inplace by position": ({"op": "torch.nn.functional.relu", "args": [V, True]}, "relu.*positional"),
    "training": ({"op": "torch.nn.functional.batch_norm", "args": [V, V, V, V, V, True]}, "batch_norm.*positional"),
    "renormalised weight": (
        {"op": "torch.nn.functional.embedding", "args": [V, V], "kwargs": {"max_norm": 1}},
        "max_norm",
    ),
    "pinned memory": ({"op": "torch.zeros", "args": [3], "kwargs": {"pin_memory": True}}, "'pin_memory'"),
    "dunder keyword": ({"op": "torch.add", "args": [V, V], "kwargs": {"__class__": 1}}, "torch.add.*'__class__'"),
    "keyword that is code": ({"op": "torch.add", "args": [V, V], "kwargs": {"a=1)#": 1}}, "torch.add.*no plain name"),
    "empty keyword": ({"op": "torch.add", "args": [V, V], "kwargs": {"": 1}}, "torch.add.*no plain name"),
    "constant changed": ({"op": "Tensor.zero_", "args": [{"tensor": "x"}]}, "Tensor.zero_.*constant"),
    "target by keyword": ({"op": "Tensor.zero_", "kwargs": {"self": V}}, "Tensor.zero_.*constant"),
    "generator where nothing is drawn": (
        {"op": "torch.add", "args": [V, V], "kwargs": {"generator": {"seed": 1}}},
        "draws no",
    ),
    "generator that is a number": (
        {"op": "torch.randn", "args": [3], "kwargs": {"generator": 7}},
        "torch.randn.*generator",
    ),
    "seed below 0": ({"op": "torch.randn", "args": [3], "kwargs": {"generator": {"seed": -1}}}, "torch.randn.*seed"),
    "seed elsewhere": ({"op": "torch.full", "args": [[3], {"seed": 1}]}, "torch.full.*seed"),
    "dtype that is a path": ({"op": "Tensor.to", "args": [V, {"dtype": "os.system"}]}, "Tensor.to.*dtype"),
    "quantised dtype": ({"op": "Tensor.to", "args": [V, {"dtype": "qint8"}]}, "Tensor.to.*dtype"),
    "device that is a path": ({"op": "Tensor.to", "args": [V, {"device": "file:///etc/passwd"}]}, "Tensor.to.*device"),
    "other device": ({"op": "Tensor.to", "args": [V, {"device": "meta"}]}, "Tensor.to.*device"),
    "tensor that is a path": ({"op": "torch.add", "args": [V, {"tensor": "../../etc/passwd"}]}, "torch.add.*tensor"),
    "class of a value": ({"op": "attribute", "args": [V, "__class__"]}, "attribute.*__class__"),
    "private attribute": ({"op": "attribute", "args": [V, "_base"]}, "attribute.*_base"),
    "chain of attributes": ({"op": "attribute", "args": [V, "T.__class__"]}, "attribute"),
    "globals": ({"op": "attribute", "args": [V, "__globals__"]}, "attribute.*__globals__"),
    "pointer as an attribute": ({"op": "attribute", "args": [V, "data_ptr"]}, "attribute.*data_ptr"),
    "storage as an attribute": ({"op": "attribute", "args": [V, "storage"]}, "attribute.*storage"),
    "data": ({"op": "attribute", "args": [V, "data"]}, "attribute.*'data'"),
    "hook as an attribute": ({"op": "attribute", "args": [V, "register_hook"]}, "attribute.*register_hook"),
    "attribute that is a value": ({"op": "attribute", "args": [V, V]}, "attribute"),
    "attribute of a constant": ({"op": "attribute", "args": [{"tensor": "x"}, "T"]}, "attribute"),
    "module path that is code": (
        {"op": "model.output", "args": [{"ref": 0}, "layers[0].__class__"]},
        "model.output.*path",
    ),
    "module path up": ({"op": "model.output", "args": [{"ref": 0}, "layers..config"]}, "model.output.*path"),
    "module path with a line break": ({"op": "model.output", "args": [{"ref": 0}, "layers.0\n"]}, "model.output.*path"),
    "deep source path": ({"op": "model.output", "args": [{"ref": 0}, "a" + ":b" * 50]}, "model.output.*path"),
    "parameter that is code": ({"op": "model.parameter", "args": ["", "config._name_or_path()"]}, "model.parameter"),
    "method of the model": ({"op": "model.call", "args": ["save_pretrained()", "/tmp/x"]}, "model.call"),
    "call below 0": ({"op": "model.output", "args": [{"ref": 0}, "a"], "kwargs": {"call": -1}}, "model.output.*call"),
    "endless call": (
        {"op": "model.output", "args": [{"ref": 0}, "a"], "kwargs": {"call": 10**9}},
        "model.output.*call",
    ),
    "code of generate": (
        {"op": "model.generate", "kwargs": {"custom_generate": "evil/repo"}},
        "model.generate.*custom_gen",
    ),
    "remote code": ({"op": "model.generate", "kwargs": {"trust_remote_code": True}}, "model.generate.*trust_remote"),
    "processor": ({"op": "model.generate", "kwargs": {"logits_processor": []}}, "model.generate.*logits_processor"),
    "streamer": ({"op": "model.generate", "kwargs": {"streamer": V}}, "model.generate.*streamer"),
    "other model": ({"op": "model.generate", "kwargs": {"assistant_model": V}}, "model.generate.*assistant_model"),
    "cache by name": ({"op": "model.generate", "kwargs": {"cache_implementation": "x"}}, "model.generate.*cache_impl"),
    "configuration": (
        {"op": "model.generate", "kwargs": {"generation_config": "/tmp"}},
        "model.generate.*generation_c",
    ),
    "generate by position": ({"op": "model.generate", "args": [V]}, "model.generate.*keywords only"),
    "generate for ever": (
        {"op": "model.generate", "kwargs": {"max_new_tokens": 10**12}},
        "model.generate.*max_new_tokens",
    ),
    "generate without a seed": ({"op": "model.generate", "kwargs": {"do_sample": True}}, "model.generate.*seed"),
    "seed of generate": ({"op": "model.generate", "kwargs": {"do_sample": True, "seed": "x"}}, "model.generate.*seed"),
    "rows from below": ({"op": "model.invoke", "args": [{"ref": 0}, -1, 2]}, "model.invoke.*rows"),
    "rows backwards": ({"op": "model.invoke", "args": [{"ref": 0}, 3, 2]}, "model.invoke.*rows"),
    "rows out of range": ({"op": "model.invoke", "args": [{"ref": 0}, 0, 10**15]}, "model.invoke.*rows"),
    "rows of a value": ({"op": "model.invoke", "args": [V, 0, 1]}, "model.invoke"),
    "gradient of a constant": ({"op": "grad.read", "args": [3]}, "grad.read"),
    "backward that is none": ({"op": "grad.read", "args": [V], "kwargs": {"backward": V}}, "grad.read.*backward"),
    "list in place of a constant": ({"op": "container.append", "args": [[1], 2]}, "container.append"),
    "private key": ({"op": "container.dict", "kwargs": {"__class__": 1}}, "container.dict.*__class__"),
    "range of text": ({"op": "control.range", "args": ["9" * 9]}, "control.range"),
    "leave outside of loops": ({"op": "control.leave", "args": [True]}, "control.leave.*no loop"),
    "leave with a keyword": ({"op": "control.leave", "kwargs": {"condition": True}}, "control.leave.*one argument"),
    "check of nothing": ({"op": "control.check"}, "control.check.*condition"),
    "check with a keyword": ({"op": "control.check", "args": [True], "kwargs": {"a": 1}}, "control.check.*condition"),
    "constant reached": ({"op": "control.reached", "args": [3]}, "control.reached.*a node"),
    "forward reached": ({"op": "control.reached", "args": [{"ref": 0}]}, "control.reached.*forward"),
    "lengths of two": ({"op": "container.length", "args": [V, V]}, "container.length.*one argument"),
    "forward as a value": ({"op": "torch.sum", "args": [{"ref": 0}]}, "torch.sum.*forward"),
    "forward saved": ({"op": "save", "args": [{"ref": 0}]}, "save.*forward"),
    "itself": ({"op": "torch.add", "args": [{"ref": 2}, 1]}, "torch.add.*node 2"),
    "a later node": ({"op": "torch.add", "args": [{"ref": 9}, 1]}, "torch.add.*node 9"),
    "before the first": ({"op": "torch.add", "args": [{"ref": -1}, 1]}, "torch.add.*node -1"),
    "huge reference": ({"op": "torch.add", "args": [{"ref": 2**62}, 1]}, "torch.add.*node"),
    "itself in a slice": (
        {"op": "operator.getitem", "args": [V, {"slice": [{"ref": 2}, None, None]}]},
        "getitem.*node 2",
    ),
    "its own block": ({"op": "torch.add", "args": [V, 1], "block": 2}, "torch.add.*block of node 2"),
    "block that opens nothing": ({"op": "torch.add", "args": [V, 1], "block": 1}, "torch.add.*block of node 1"),
    "block below 0": ({"op": "torch.add", "args": [V, 1], "block": -1}, "torch.add.*block of node -1"),
    "loop without end": ({"op": "control.loop", "args": [V]}, "loop of node 2 has no end"),
}


@pytest.mark.parametrize(("node", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_argument_is_refused_with_its_operation(node, message):
    """An allowed operation gets no arguments by which it would do something else."""
    refusal = _refusal(_document(node))
    assert re.search(message, refusal), refusal


def _if(*then):
    return _document({"op": "control.if", "args": [V]}, *then)


def _loop(*then):
    return _document({"op": "control.loop", "args": [V]}, *then)


END = {"op": "control.end", "args": [{"ref": 2}]}
BLOCKS = {
    "else of a loop": (_loop({"op": "control.else", "args": [{"ref": 2}]}), "control.else"),
    "else inside its own if": (
        _if({"op": "control.else", "args": [{"ref": 2}], "block": 2}),
        "control.else.*same block",
    ),
    "merge of a value": (_document({"op": "control.merge", "args": [V, 1, 2]}), "control.merge"),
    "merge inside": (_if({"op": "control.merge", "args": [{"ref": 2}, 1, 2], "block": 2}), "control.merge.*same block"),
    "if in itself": (_document({"op": "control.if", "args": [V], "block": 2}), "control.if.*block of node 2"),
    "two ends": (_loop(END, END), "control.end.*second time"),
    "end inside": (_loop({**END, "block": 2}), "control.end.*same block"),
    "body after the end": (
        _loop(END, {"op": "torch.add", "args": [V, 1], "block": 2}),
        "loop of node 2, which is over",
    ),
    "value from inside": (
        _loop({"op": "torch.add", "args": [V, 1], "block": 2}, END, {"op": "torch.add", "args": [{"ref": 3}, 1]}),
        "torch.add.*node 3 from outside",
    ),
    "item outside": (_loop({"op": "control.item", "args": [{"ref": 2}]}, END), "control.item.*stand in the loop"),
    "next of a value": (_loop({"op": "control.next", "args": [V, 1], "block": 2}, END), "control.next"),
    "next without a variable": (
        _loop({"op": "control.carried", "block": 2}, {"op": "control.next", "args": [{"ref": 3}, 1], "block": 2}, END),
        "control.carried",
    ),
    "final of the body": (
        _loop(END, {"op": "control.final", "args": [{"ref": 3}, V]}),
        "control.final.*not in the loop",
    ),
    "final of a malformed end": (
        _loop({"op": "control.end"}, {"op": "control.final", "args": [{"ref": 3}, {"ref": 2}]}),
        "control.end",
    ),
    "collect of a loop": (_loop(END, {"op": "control.collect", "args": [{"ref": 2}, V]}), "control.collect"),
    "set in a loop": (
        _loop({"op": "model.set_output", "args": [{"ref": 0}, "a", V], "block": 2}, END),
        "model.set_output.*stands in a loop",
    ),
    "loops that overlap": (
        _loop(
            {"op": "control.loop", "args": [V], "block": 2},
            END,
            {"op": "control.end", "args": [{"ref": 3}], "block": 2},
        ),
        "control.end.*loop of node 2, which is over|loop of node 3",
    ),
    "deep blocks": (
        _document(*({"op": "control.if", "args": [V], **({"block": i + 1} if i else {})} for i in range(40))),
        r"control.if\) stands in more than 16 blocks",
    ),
    "block deeper than memory": (
        _document(*({"op": "control.if", "args": [V], **({"block": i + 1} if i else {})} for i in range(5_000))),
        r"control.if\) stands in more than 16 blocks",
    ),
    "many loops": (
        _document(*({"op": "control.loop", "args": [V]} for _ in range(1001))),
        "1001 loops; the limit is 1000",
    ),
}


@pytest.mark.parametrize(("document", "message"), BLOCKS.values(), ids=BLOCKS.keys())
def test_crooked_block_is_refused(document, message):
    """Conditionals and loops that overlap, refer to themselves or never end are refused at the node that does so."""
    refusal = _refusal(document)
    assert re.search(message, refusal), refusal


def _nested(kind, depth):
    return _document({"op": "torch.full", "args": [json.loads(f'{{"{kind}": [' * depth + "1" + "]}" * depth)]})


DOCUMENTS = {
    "pickled document": (b"\x80\x04\x95\x1a\x00", "not valid JSON"),
    "YAML": ("!!python/object/apply:os.system [id]", "not valid JSON"),
    "nothing": ("", "not valid JSON"),
    "duplicate key": (_document()[:-1] + ', "kind": "trace"}', "duplicate key 'kind'"),
    "duplicate key of a node": (_document().replace('"id": 1,', '"id": 1, "op": "torch.load",'), "duplicate key 'op'"),
    "duplicate key of a dict": (
        _document({"op": "torch.full", "args": [{"dict": [["a", 1], ["a", 2]]}]}),
        "duplicate key",
    ),
    "key that is a value": (_document({"op": "torch.full", "args": [{"dict": [[V, 1]]}]}), "is not a string"),
    "NaN as an id": (_document().replace('"id": 1', '"id": NaN'), "NaN is no JSON number"),
    "infinity as an id": (_document().replace('"id": 1', '"id": Infinity'), "Infinity is no JSON number"),
    "id beyond a double": (_document().replace('"id": 1', '"id": 1e999'), "is not an integer"),
    "id as text": (_document().replace('"id": 1', '"id": "1"'), "is not an integer"),
    "id that is true": (_document().replace('"id": 1', '"id": true'), "is not an integer"),
    "ids in another order": (_document({"id": 7, "op": "torch.sum", "args": [V]}), "id 7 at position 2"),
    "same id twice": (_document({"id": 1, "op": "torch.sum", "args": [V]}), "id 1 at position 2"),
    "reference that is NaN": (_document({"op": "torch.sum", "args": [{"ref": "nan"}]}), "is not an integer"),
    "reference that is true": (_document({"op": "torch.sum", "args": [{"ref": True}]}), "is not an integer"),
    "block that is true": (_document({"op": "torch.sum", "args": [V], "block": True}), "is not an integer"),
    "block of null": (_document({"op": "torch.sum", "args": [V], "block": None}), "is not an integer"),
    "seed that is text": (_document({"op": "torch.rand", "kwargs": {"generator": {"seed": "x"}}}), "is not an integer"),
    "seed beyond 64 bits": (_document({"op": "torch.rand", "kwargs": {"generator": {"seed": 2**64}}}), "64 bits"),
    "object of a type": (
        _document({"op": "torch.sum", "args": [{"py/object": "os.system"}]}),
        "unknown type 'py/object'",
    ),
    "function": (_document({"op": "einops.reduce", "args": [V, "a -> ", {"function": "print"}]}), "unknown type"),
    "pickle inside": (_document({"op": "torch.sum", "args": [{"pickle": "gASV"}]}), "unknown type 'pickle'"),
    "two types": (_document({"op": "torch.sum", "args": [{"ref": 1, "tensor": "x"}]}), "not exactly one key"),
    "no type": (_document({"op": "torch.sum", "args": [{}]}), "not exactly one key"),
    "huge integer": (_document({"op": "torch.full", "args": [[1], 10**30]}), "more than 64 bits"),
    "endless integer": (_document().replace('"id": 1', '"id": ' + "9" * 10_000), "not valid JSON"),
    "endless text": (
        _document({"op": "torch.einsum", "args": ["i" * 100_000, V]}),
        "100000 characters; the limit is 65536",
    ),
    "endless name": (_document({"op": "torch." + "x" * 100_000}), "characters; the limit is 1000"),
    "number beyond a double": (_document().replace('"layers.0"', "1e999"), "beyond the range of a double"),
    "deep lists": ("[" * 100_000, "nested too deeply"),
    "deep objects": ('{"a":' * 100_000, "nested too deeply"),
    "deep tuples": (_nested("tuple", 50), "nested more than 32 deep"),
    "deep slices": (_document({"op": "torch.sum", "args": [{"slice": [{"slice": [1, 2, 3]}, 1, 1]}]}), "slice"),
    "too many forwards": (
        _document(*({"op": "model.forward"} for _ in range(10_001))),
        "10002 forward passes; the limit",
    ),
    "too many saves": (_document(saves={str(i): 0 for i in range(50_001)}), "50001 saved values; the limit is 50000"),
    "too large": (" " * ((64 << 20) + 1), "the limit is 67108864"),
    "save of what is no save": (_document(saves={"a": 1}), "'a' names node 1"),
    "save of nothing": (_document(saves={"a": -1}), "'a' names node -1"),
    "save beyond the end": (_document(saves={"a": 10**9}), "'a' names node 1000000000"),
    "another kind": (_document(kind="shell"), "kind 'shell'"),
    "another format": (_document(format="torchscript"), "not an intervention graph"),
    "another version": (_document(version=99), "version 99"),
    "code beside the graph": (_document(code="import os"), "unknown key 'code'"),
    "code in a node": (_document({"op": "torch.sum", "args": [V], "code": "import os"}), "unknown key 'code'"),
    "code in the model": (_document(model={"id": "m", "auto_map": "evil--m"}), "unknown key 'auto_map'"),
    "model that is a list": (_document(model=["m"]), "model is not an object"),
    "nodes that are an object": (_document(nodes={"0": FORWARD}), "nodes is not a list"),
    "arguments that are text": (_document({"op": "torch.sum", "args": "abc"}), "is not a list"),
    "source that is an object": (_document({"op": "torch.sum", "args": [V], "source": {"f": 1}}), "is not a list"),
    "half a surrogate": (_document().replace("layers.0", "\\ud800"), "model.output"),
}


@pytest.mark.parametrize(("document", "message"), DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_document_is_refused_with_the_limit_or_the_place(document, message):
    """Tricks with JSON, with sizes, with ids and with depth are refused, and the message says which."""
    refusal = _refusal(document)
    assert message in refusal, refusal


def test_too_many_nodes_are_refused():
    """A graph of more nodes than the limit is refused with both numbers, before any node is looked at."""
    with pytest.raises(InvalidGraph, match="200001 nodes; the limit is 200000"):
        validate(Graph((Node(0, "torch.load", ("/etc/passwd",)),) * 200_001))


def test_refusal_stays_short():
    """A graph of ten thousand bad nodes is refused with a message that a person can read."""
    refusal = _refusal(_document(*({"op": "os.system" + "x" * 900, "args": ["id"]} for _ in range(10_000))))
    assert len(refusal) < 20_000
    assert "and more" in refusal
