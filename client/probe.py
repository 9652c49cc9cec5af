"""The smallest request there is: one token through a language model, built without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.graph import capture_graph
from nnsight_hpc.wire.frames import pack

if TYPE_CHECKING:
    from nnsight_hpc.wire.messages import ModelIdentity

_TENSORS = {"input_ids": 0, "attention_mask": 1, "position_ids": 0}


def probe_frame(model: ModelIdentity) -> bytes:
    """The frame of a request for what `model` itself gives for one token."""
    return pack(capture_graph({"output": "output"}, model).to_json().encode(), _safetensors(_TENSORS))


def _safetensors(numbers: dict[str, int]) -> bytes:
    """Tensors of shape [1, 1] as huggingface/safetensors describes its format: a header in JSON, then the bytes."""
    header = {
        name: {"dtype": "I64", "shape": [1, 1], "data_offsets": [8 * place, 8 * place + 8]}
        for place, name in enumerate(numbers)
    }
    described = msgspec.json.encode(header)
    return b"".join(
        [
            len(described).to_bytes(8, "little"),
            described,
            *(number.to_bytes(8, "little") for number in numbers.values()),
        ]
    )
