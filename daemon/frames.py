"""Whether a stored frame is what it should be, without holding its block: graphs, their tensors, and corpora."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

import msgspec

from nnsight_hpc.graph import Graph, validate
from nnsight_hpc.wire.errors import InvalidGraph, InvalidInput
from nnsight_hpc.wire.frames import MAX_HEADER
from nnsight_hpc.wire.messages import DumpSpec, decode

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.wire.messages import ModelIdentity

_LONGEST_LINE = 64 << 20


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a corpus."""

    id: str
    text: str


def check_run(path: Path) -> ModelIdentity:
    """The model that the graph in this frame was made for. Raises `InvalidInput` or `InvalidGraph` for what is wrong."""
    with path.open("rb") as file:
        graph = Graph.from_json(_header(file, path.stat().st_size))
        validate(graph)
        names = _tensor_names(file, path.stat().st_size - file.tell())
    if missing := sorted(graph.tensor_names() - names):
        raise InvalidGraph("the graph refers to tensors that were not sent with it", why=", ".join(missing))
    return graph.model


def check_dump(path: Path, name: str) -> DumpSpec:
    """What this frame asks to dump. Raises `InvalidInput` for what is wrong with it, or with a line of its corpus."""
    with path.open("rb") as file:
        dump = decode(_header(file, path.stat().st_size), DumpSpec, what="dump")
        _check_spec(dump, name)
        if not _check_corpus(file):
            raise InvalidInput("the corpus has no document", next='send at least one line {"id": …, "text": …}')
    return dump


def _header(file: BinaryIO, size: int) -> bytes:
    """As `wire.frames.unpack`, from a file; `file` is at the block then."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise InvalidInput("not a valid frame", why=f"{size} bytes, of which the header would be {length}")
    return file.read(length)


class _TensorInfo(msgspec.Struct):
    data_offsets: tuple[int, int]


def _tensor_names(file: BinaryIO, size: int) -> set[str]:
    """The names in a safetensors block, whose sizes must be those of the block (huggingface/safetensors, "Format")."""
    if size == 0:
        return set()
    header = _header(file, size)
    fields = decode(header, dict[str, msgspec.Raw], what="safetensors header")
    fields.pop("__metadata__", None)
    ends = [decode(bytes(raw), _TensorInfo, what="safetensors header").data_offsets[1] for raw in fields.values()]
    if max(ends, default=0) != size - 8 - len(header):
        raise InvalidInput(
            "the tensors do not fill their block", why=f"{size} bytes, they end at {max(ends, default=0)}"
        )
    return set(fields)


def _check_spec(dump: DumpSpec, name: str) -> None:
    problems = [] if dump.name == name else [f"it is named {dump.name}, but was sent as {name}"]
    if not dump.captures:
        problems.append("it captures nothing")
    if dump.format != "zarr":
        problems.append(f"its format is {dump.format}; this version writes zarr")
    sizes = {"context": dump.context, "batch_tokens": dump.batch_tokens}
    problems += [f"{field} is {given}, and must be at least 1" for field, given in sizes.items() if given < 1]
    if problems:
        raise InvalidInput(f"dataset {name} cannot be written as it is described", why="\n".join(problems))


def _check_corpus(file: BinaryIO) -> int:
    """The number of documents; a line that is none is named."""
    decoder, count = msgspec.json.Decoder(Document), 0
    while line := file.readline(_LONGEST_LINE):
        count += 1
        try:
            decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(f"line {count} of the corpus is no document", why=str(error)) from None
    return count
