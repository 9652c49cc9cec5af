"""Pool definitions: what people give for a pool, as ``[pool.NAME]`` in a TOML file.

::

    [pool.llama]
    cluster = "uni"                           # where it is to run; without, as for every command
    model = "/scratch/models/Llama-3.1-8B"
    replicas = "0:2"
    gpus_per_node = 1
    mem = "64G"
    time = "08:00:00"

    [pool.llama.policy]
    parameters = false

The keys are those of `PoolSpec`, and ``cluster``. Only what is given is sent: a site fills in its own defaults.
"""

from __future__ import annotations

import difflib
from typing import Any

import msgspec

from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.names import check_name
from nnsight_hpc.wire.pools import PoolSpec

CLUSTER = "cluster"
_KEYS = (CLUSTER, *(field for field in PoolSpec.__struct_fields__ if field != "name"))
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def definition(name: str, table: object, *, where: str) -> dict[str, Any]:
    """The keys of ``[pool.NAME]`` as they are sent, and ``cluster``; raises `InvalidInput` with `where` and the key."""
    check_name(name, of="pool")
    keys = _checked_keys(table, where)
    if isinstance(memory := keys.get("request_memory"), str):
        keys["request_memory"] = memory_bytes(memory, where=where)
    if not isinstance(keys.get(CLUSTER, ""), str):
        raise InvalidInput(f"{CLUSTER} is not a name: {keys[CLUSTER]!r}", where=where)
    check_values(name, {key: value for key, value in keys.items() if key != CLUSTER}, where=where)
    return keys


def check_values(name: str, keys: dict[str, Any], *, where: str = "") -> None:
    """Raise `InvalidInput` for a value of another type than its key has, or that means nothing."""
    try:
        spec = msgspec.convert({"name": name, "model": "", **keys}, PoolSpec)
        _ = spec.most, spec.idle_seconds  # they raise
    except msgspec.ValidationError as error:
        raise InvalidInput(f"pool {name} has a wrong value", where=where, why=str(error)) from None
    except InvalidInput as error:
        error.where = where
        raise


def memory_bytes(text: str, *, where: str = "") -> int:
    """A size as Slurm writes it: a number with K, M, G or T (powers of 1024); without, bytes."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if not number.isascii() or not number.isdigit() or unit not in _UNITS:
        raise InvalidInput(f"{text!r} is not a size like 500M or 8G", where=where)
    return int(number) * _UNITS[unit]


def _checked_keys(table: object, where: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise InvalidInput("a pool is not a table", where=where, next="write [pool.NAME], and its keys below")
    for key in table:
        if key not in _KEYS:
            close = difflib.get_close_matches(key.replace("-", "_"), _KEYS, n=1)
            allowed = f"allowed here: {', '.join(_KEYS)}"
            raise InvalidInput(
                f"a pool has no key {key!r}", where=where, next=f"did you mean {close[0]!r}?" if close else allowed
            )
    return dict(table)
