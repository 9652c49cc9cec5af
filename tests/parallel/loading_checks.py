"""Models loaded over the ranks, against the same model in one process; faults of one rank; what is not split really."""

from __future__ import annotations

import errno
import shutil
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from nnsight_hpc.models import load
from nnsight_hpc.parallel.loading import held_bytes, load_parallel
from nnsight_hpc.parallel.plans import packed
from nnsight_hpc.wire.errors import HpcError, Incompatible, InvalidInput, NotFound, ReplicaFailed
from tests.models_for_tests import CACHE
from tests.parallel.families import FAMILIES, VOCABULARY, save

TOLERANCE = 1e-4
"""Of the largest logit, or gradient: float32 sums in another order; 4e-6 was seen."""
SMOLLM2 = CACHE / "nnsight-hpc" / "models" / "SmolLM2-135M-Instruct"


def saved(rank, name: str, make=None) -> str:
    """The folder of a family's model, or of what `make` makes, written by rank 0 where all see it."""
    folder = Path(tempfile.gettempdir()) / "models" / name

    def write() -> None:
        if not folder.exists():
            make().save_pretrained(folder) if make else save(name, folder)

    from_rank_0(rank, write)
    return str(folder)


def loaded(rank, folder: str, **options):
    return load_parallel(folder, rank.world, rank.guard, **options)


def from_rank_0(rank, make):
    """What rank 0 makes; what it raises is raised on all ranks, so that none waits for it."""
    return rank.world.comm.bcast(rank.guard.run(lambda: make() if rank.world.rank == 0 else None))


def assert_near(expected: torch.Tensor, actual: torch.Tensor) -> None:
    assert (actual - expected).abs().max().item() <= TOLERANCE * expected.abs().max().item()


def assert_same_on_all_ranks(rank, tensor: torch.Tensor) -> None:
    assert all(torch.equal(other, tensor) for other in rank.world.comm.allgather(tensor))


def results(model, ids) -> dict[str, torch.Tensor]:
    """Logits without and with gradients, the gradient of the embeddings, and three greedy tokens."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        embedded = model.get_input_embeddings()(ids)
        generated = model.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    embedded = embedded.detach().requires_grad_()
    again = model(inputs_embeds=embedded, use_cache=False).logits
    again.pow(2).mean().backward()
    return {"logits": logits, "with grad": again.detach(), "gradient": embedded.grad, "tokens": generated}


def assert_like_one_process(rank, folder: str, tokens: int, attention: str | None = None) -> None:
    """Logits and gradients are near those of one process, greedy tokens equal, and ranks bitwise alike."""
    ids = torch.randint(3, tokens, (2, 17), generator=torch.Generator().manual_seed(1))
    expected = from_rank_0(rank, lambda: results(load(folder, attn_implementation=attention).module, ids))
    ours = loaded(rank, folder)
    if attention:
        ours.module.set_attn_implementation(attention)
    assert not ours.module.training
    assert not any(parameter.requires_grad for parameter in ours.module.parameters())
    for name, actual in results(ours.module, ids).items():
        assert_same_on_all_ranks(rank, actual)
        if name == "tokens":
            assert torch.equal(expected[name], actual)
        else:
            assert_near(expected[name], actual)


def _of_family(name: str):
    def check(rank):
        folder = saved(rank, name)
        if name == "llama_2_kv_heads" and rank.world.size == 3:
            with pytest.raises(InvalidInput, match="2 key and value heads"):
                loaded(rank, folder)
            return
        for attention in ("sdpa", "eager") if "kv_head" in name else (None,):  # which count heads in other ways
            assert_like_one_process(rank, folder, VOCABULARY, attention)

    return check


for _name in FAMILIES:
    globals()[f"check_{_name}"] = _of_family(_name)


def check_smollm2(rank):
    """The real SmolLM2 goes over three ranks, as in one process; over two or four it is refused."""
    if rank.world.size == 3:
        assert_like_one_process(rank, str(SMOLLM2), 40_000)
    else:
        with pytest.raises(InvalidInput) as caught:
            loaded(rank, str(SMOLLM2))
        assert caught.value.next.endswith("1, 3")


def check_every_rank_holds_its_part(rank):
    """Matrices are split, evenly but for the vocabulary; a rank's bytes are those of its part and of what is whole."""
    folder, size = saved(rank, "gpt2"), rank.world.size
    module, whole = loaded(rank, folder).module, load(folder).module.state_dict()
    bytes_of_part = 0
    for name, parameter in module.named_parameters():
        if name == "transformer.wpe.weight" or "ln_" in name:
            assert not isinstance(parameter, DTensor)
            assert torch.equal(whole[name], parameter)
            bytes_of_part += parameter.nbytes
            continue
        assert torch.equal(whole[name], parameter.full_tensor())
        part = parameter.to_local()
        if not name.endswith("c_proj.bias"):
            assert parameter.numel() == rank.world.comm.allreduce(part.numel())
            assert "wte" in name or parameter.numel() == size * part.numel()
        bytes_of_part += part.nbytes
    assert bytes_of_part == held_bytes(module)


def check_packed_outputs_are_told(rank):
    """GPT-2's queries, keys and values lie one after another in a rank's slice; nothing else there is packed."""
    module = loaded(rank, saved(rank, "gpt2")).module
    found = {name: packed(module, name) for name, _ in module.named_modules()}
    assert {name: 3 for name in found if name.endswith("c_attn")} == {
        n: parts for n, parts in found.items() if parts > 1
    }


def check_a_dtype_can_be_chosen(rank):
    """bfloat16 is the dtype of all parameters and costs half the memory; the result is that of one process, rounded."""
    folder = saved(rank, "llama")
    module, wide = loaded(rank, folder, dtype="bfloat16").module, loaded(rank, folder).module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert 2 * held_bytes(module) == held_bytes(wide)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, actual = wide(ids).logits, module(ids).logits.float()
    assert (actual - expected).abs().max().item() < 0.05 * expected.abs().max().item()


def check_progress_is_told_by_rank(rank):
    """Rank 0 hears the bytes of all ranks: from none to all, never fewer; a rank counts what it has done with."""
    folder, heard = saved(rank, "mixtral"), []
    loaded(rank, folder, progress=lambda done, total: heard.append((done, total)))
    if rank.world.rank:
        assert heard == []
        return
    total = (Path(folder) / "model.safetensors").stat().st_size
    assert {total} == {of for _, of in heard}
    assert [0] * rank.world.size == heard[0][0]
    assert [total] * rank.world.size == heard[-1][0]
    for one in range(rank.world.size):
        course = [done[one] for done, _ in heard]
        assert course == sorted(course)
    assert any(0 < done[0] < total for done, _ in heard)


def check_progress_that_raises(rank):
    """What whoever is told raises ends loading on all ranks; loading again succeeds."""
    folder, calls = saved(rank, "llama"), []

    def progress(*told):
        calls.append(told)
        if len(calls) > 3:
            raise KeyError("enough")

    with pytest.raises(HpcError, match="enough") as caught:
        loaded(rank, folder, progress=progress)
    assert "raised by rank 0 on" in caught.value.why
    loaded(rank, folder)


def check_replicated(rank):
    """A family without a plan is refused, and loaded whole on every rank when asked for."""
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=24, n_layer=1, n_head=2)
    folder = saved(rank, "bloom", lambda: transformers.BloomForCausalLM(config))
    with pytest.raises(InvalidInput, match="'bloom' cannot be split"):
        loaded(rank, folder)
    ids = torch.arange(3, 20)[None]
    ours, alone = loaded(rank, folder, replicated=True), load(folder)
    with torch.no_grad():
        assert torch.equal(alone.module(ids).logits, ours.module(ids).logits)
    assert alone.identity == ours.identity


@contextmanager
def failing(at: int, error: Exception):
    """Reading weights fails at so many parameters."""
    seen = []

    def hook(_module, _name, parameter):
        if parameter is not None and not parameter.is_meta:
            seen.append(_name)
            if len(seen) == at:
                raise error

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def check_a_rank_that_fails_while_it_reads(rank):
    """An error of one rank amid its weights is an error of all, with the rank's name; loading again succeeds."""
    folder = saved(rank, "llama")
    for culprit, at, error, expected in (
        (0, 1, MemoryError("no memory"), ReplicaFailed),
        (rank.world.size - 1, 9, OSError(errno.EIO, "Input/output error"), InvalidInput),
    ):
        with pytest.raises(expected) as caught, failing(at, error) if rank.world.rank == culprit else nullcontext():
            loaded(rank, folder)
        assert str(error) in caught.value.why
        assert f"raised by rank {culprit} on" in caught.value.why
    assert_like_one_process(rank, folder, VOCABULARY)


def check_a_rank_that_runs_out_of_gpu_memory(rank):
    """It is told as what it is, although it is a runtime error to torch."""
    with pytest.raises(ReplicaFailed, match="not the memory"), failing(3, torch.OutOfMemoryError("tried to allocate")):
        loaded(rank, saved(rank, "llama"))


def own_copy(rank, name: str) -> Path:
    """A copy of a model for each rank, as on a node's own disk."""
    folder = Path(saved(rank, name))
    copy = folder.with_name(f"{name}-{rank.world.rank}")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    return copy


def check_a_rank_without_the_model(rank):
    """A folder that one rank does not see is NotFound on all, and names the rank."""
    copy, last = own_copy(rank, "llama"), rank.world.size - 1
    if rank.world.rank == last:
        shutil.rmtree(copy)
    with pytest.raises(NotFound, match="no such folder") as caught:
        loaded(rank, str(copy))
    assert f"raised by rank {last} on" in caught.value.why


def check_a_rank_with_other_weights(rank):
    """Files that differ, are cut off or are no safetensors on one rank are refused on all before anything is loaded."""
    last = rank.world.size - 1
    copy = own_copy(rank, "llama")
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    for content, expected in (
        (whole[:-4] + b"else", Incompatible),
        (whole[:-1000], Incompatible),
        (b"\x08" + bytes(7) + b"garbage!", InvalidInput),
    ):
        weights.write_bytes(content if rank.world.rank == last else whole)
        with pytest.raises(expected) as caught:
            loaded(rank, str(copy))
        assert f"rank {last} on" in caught.value.why


def check_files_that_are_cut_off_everywhere(rank):
    """A file that ends too early is an error in clear text, not one of a library."""
    folder = Path(own_copy(rank, "qwen2"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InvalidInput, match="cannot be loaded") as caught:
        loaded(rank, str(folder))
    assert str(folder.parent) in caught.value.where
    assert "incomplete" in caught.value.why.lower()


def check_weights_that_no_file_has(rank):
    """A model of which a tensor is missing is refused: transformers would make one up, another one on each rank."""
    from safetensors.torch import load_file, save_file

    folder = own_copy(rank, "opt")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.decoder.layers.1.fc1.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rank.world.comm.Barrier()
    with pytest.raises(InvalidInput, match="weights are missing") as caught:
        loaded(rank, str(folder))
    assert "model.decoder.layers.1.fc1.weight" in caught.value.why


def check_weights_that_lie_in_one_tensor(rank):
    """A family whose files hold weights in one tensor, which would be sliced before they are cut apart, is refused."""
    sizes = {"hidden_size": 96, "intermediate_size": 48, "num_attention_heads": 12, "num_key_value_heads": 12}
    config = transformers.HrmTextConfig(vocab_size=VOCABULARY, num_hidden_layers=2, head_dim=8, **sizes)
    folder = saved(rank, "hrm_text", lambda: transformers.HrmTextForCausalLM(config))
    with pytest.raises(InvalidInput, match="'hrm_text' cannot be split") as caught:
        loaded(rank, folder)
    assert "in one tensor" in caught.value.why


@contextmanager
def style_that_does_nothing(name: str):
    """As if transformers had changed: a style splits nothing, and nobody says so."""

    class Nothing(type(ALL_PARALLEL_STYLES[name])):
        def shard_param(self, module, param, mesh):
            pass

    before = ALL_PARALLEL_STYLES[name]
    ALL_PARALLEL_STYLES.register(name, Nothing())
    try:
        yield
    finally:
        ALL_PARALLEL_STYLES.register(name, before)


def check_what_is_left_whole_is_noticed(rank):
    """A model that transformers leaves whole where its plan splits it is refused, with the names."""
    with style_that_does_nothing("rowwise"), pytest.raises(Incompatible) as caught:
        loaded(rank, saved(rank, "llama"))
    assert "model.layers.0.self_attn.o_proj.weight is whole" in caught.value.why
    assert "q_proj" not in caught.value.why
