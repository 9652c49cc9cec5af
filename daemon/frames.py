"""Whether a frame is what it should be, without holding its block: graphs, their tensors, and corpora."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING, Annotated, BinaryIO

import msgspec

from nnsight_hpc.graph import Graph, validate
from nnsight_hpc.graph.dumps import check_dump_graph
from nnsight_hpc.storage.corpus import LONGEST_LINE, Document
from nnsight_hpc.wire.errors import InvalidGraph, InvalidInput
from nnsight_hpc.wire.frames import MAX_HEADER
from nnsight_hpc.wire.messages import DumpSpec, decode
from nnsight_hpc.wire.workers import SMALL_FRAME

if TYPE_CHECKING:
    from nnsight_hpc.graph.cobatch import Shapes

_BLOCK = 1 << 20
_SMALL, _KEPT = 8 << 10, 64
"""Bytes of a graph's document up to which it is remembered, and how many are."""


class _Known:
    """Graphs that were found to be well, by their documents: a loop over prompts sends one again and again."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[bytes, Graph] = OrderedDict()
        self._lock = Lock()

    def __contains__(self, header: bytes) -> bool:
        return header in self._graphs

    def get_or_check(self, header: bytes) -> Graph:
        """Raises `InvalidGraph` for one that is not well."""
        with self._lock:
            if header in self._graphs:
                self._graphs.move_to_end(header)
                return self._graphs[header]
        graph = Graph.from_json(header)
        validate(graph)
        if len(header) <= _SMALL:
            with self._lock:
                self._graphs[header] = graph
                if len(self._graphs) > _KEPT:
                    self._graphs.popitem(last=False)
        return graph


_known = _Known()


def is_known(file: BinaryIO) -> bool:
    """Whether the graph in this frame was checked before, so that `check_run` does not take long."""
    size = _size(file)
    return size <= SMALL_FRAME and _header(file, size) in _known


def check_run(file: BinaryIO) -> tuple[Graph, Shapes]:
    """The graph in this frame, and of which form its tensors are. Raises `InvalidInput` or `InvalidGraph`."""
    size = _size(file)
    graph = _known.get_or_check(_header(file, size))
    forms = _tensor_forms(file, size - file.tell())
    if missing := sorted(graph.tensor_names() - forms.keys()):
        raise InvalidGraph("the graph refers to tensors that were not sent with it", why=", ".join(missing))
    return graph, forms


def check_dump(file: BinaryIO, name: str) -> tuple[DumpSpec, Graph | None]:
    """What this frame asks to dump, and the graph where it brings one; in the first a hash stands for the second.

    Raises `InvalidInput` and `InvalidGraph` for what is wrong with it, or with a line of its corpus.
    """
    size = _size(file)
    dump = decode(_header(file, size), DumpSpec, what="dump")
    _check_spec(dump, name, size - file.tell())
    graph = Graph.from_json(dump.graph) if dump.graph else None
    if graph is not None:
        validate(graph)
        dump = msgspec.structs.replace(dump, graph=_check_graph_of(file, graph, dump.tensor_bytes))
    if not _check_corpus(file):
        raise InvalidInput("the corpus has no document", next='send at least one line {"id": …, "text": …}')
    return dump, graph


def _check_graph_of(file: BinaryIO, graph: Graph, tensor_bytes: int) -> str:
    """Check the graph of a dump and its tensors, and read over these; a hash of what both compute, wherever written."""
    start = file.tell()
    check_dump_graph(graph, _tensor_forms(file, tensor_bytes).keys())
    file.seek(start)
    digest = hashlib.sha256(graph.without_lines().to_json().encode())
    while left := start + tensor_bytes - file.tell():
        digest.update(file.read(min(left, _BLOCK)))
    return f"sha256:{digest.hexdigest()}"


def _size(file: BinaryIO) -> int:
    """Its bytes; it is at its first afterwards."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def _header(file: BinaryIO, size: int) -> bytes:
    """As `wire.frames.unpack`, from a file; `file` is at the block then."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
        raise InvalidInput("not a valid frame", why=f"{size} bytes, of which the header would be {length}")
    return file.read(length)


class _TensorInfo(msgspec.Struct):
    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[int, int]


def _tensor_forms(file: BinaryIO, size: int) -> Shapes:
    """What is in a safetensors block, whose sizes must be those of the block (huggingface/safetensors, "Format")."""
    if size == 0:
        return {}
    header = _header(file, size)
    fields = decode(header, dict[str, msgspec.Raw], what="safetensors header")
    fields.pop("__metadata__", None)
    infos = {name: decode(bytes(raw), _TensorInfo, what="safetensors header") for name, raw in fields.items()}
    end = max((info.data_offsets[1] for info in infos.values()), default=0)
    if end != size - 8 - len(header):
        raise InvalidInput("the tensors do not fill their block", why=f"{size} bytes, they end at {end}")
    return {name: (info.dtype, info.shape) for name, info in infos.items()}


def _check_spec(dump: DumpSpec, name: str, size: int) -> None:
    """Raise `InvalidInput` for a description that makes no sense; `size` is that of tensors and corpus together."""
    problems = [] if dump.name == name else [f"it is named {dump.name}, but was sent as {name}"]
    if bool(dump.captures) == bool(dump.graph):
        problems.append("it has either captures or a graph" if dump.graph else "it captures nothing")
    sizes = {"context": dump.context, "batch_tokens": dump.batch_tokens}
    problems += [f"{field} is {given}, and must be at least 1" for field, given in sizes.items() if given < 1]
    if not 0 <= dump.tensor_bytes <= (size if dump.graph else 0):
        problems.append(f"its tensors cannot have {dump.tensor_bytes} bytes: {size} follow")
    if problems:
        raise InvalidInput(f"dataset {name} cannot be written as it is described", why="\n".join(problems))


def _check_corpus(file: BinaryIO) -> int:
    """The number of documents; a line that is none is named."""
    decoder, count = msgspec.json.Decoder(Document), 0
    while line := file.readline(LONGEST_LINE):
        count += 1
        try:
            decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(f"line {count} of the corpus is no document", why=str(error)) from None
    return count
