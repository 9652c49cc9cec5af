"""What a site decides about everybody's pools, in a TOML file; people's own settings come after its defaults.

::

    required = ["account"]

    [defaults]
    partition = "gpu"
    setup = ["module load openmpi"]

    [allowed]
    partition = ["gpu", "gpu-long"]

    [limits]              # the largest
    nodes = 4
    time = "2-00:00:00"
    mem = "500G"

The file is ``$NNSIGHT_HPC_SITE``, else ``/etc/nnsight-hpc/site.toml``, where there is one. It is advice that is kept, not
protection: whoever may use Slurm may ask it for what he likes.
"""

from __future__ import annotations

import math
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nnsight_hpc.slurm.batch.options import memory_bytes, time_limit
from nnsight_hpc.wire.durations import seconds_of
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.places import SITE_VARIABLE
from nnsight_hpc.wire.pools import PoolSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

USUAL = Path("/etc/nnsight-hpc/site.toml")
_KEYS = tuple(key for key in PoolSpec.__struct_fields__ if key != "name")
_LISTS = ("setup", "sbatch_args")
_MEASURES: dict[str, Callable[[Any], float]] = {
    **dict.fromkeys(("nodes", "tp", "gpus_per_node", "cpus_per_task", "request_memory"), float),
    "replicas": lambda given: PoolSpec(name="", model="", replicas=given).most,
    "time": time_limit,
    "idle": lambda given: seconds_of(given, key="idle"),
    "mem": lambda given: memory_bytes(given) or math.inf,  # Slurm's 0 is all the memory of a node
}
"""What can be limited, as a number."""


class Site(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A site file; `path` is where it was read."""

    path: str = ""
    defaults: dict[str, Any] = {}
    required: tuple[str, ...] = ()
    allowed: dict[str, tuple[Any, ...]] = {}
    limits: dict[str, Any] = {}

    def complete(self, name: str, given: Mapping[str, Any]) -> PoolSpec:
        """The pool that is asked for by the keys that were `given` (None: not given), as the site will have it.

        Raises `InvalidInput` with all that is wrong.
        """
        keys = {"name": name, **self.defaults, **{key: value for key, value in given.items() if value is not None}}
        problems = [f"required: {key} must be given" for key in self.required if key not in keys]
        if problems:
            raise self._refusal(name, problems)
        try:
            spec = msgspec.convert(keys, PoolSpec)
        except msgspec.ValidationError as error:
            raise InvalidInput(f"pool {name} cannot be as it is described", why=str(error)) from None
        if problems := [*self._not_allowed(spec), *self._too_large(spec)]:
            raise self._refusal(name, problems)
        return spec

    def filled_in(self, given: Mapping[str, Any]) -> str:
        """Which keys come from the site, in words."""
        used = [f"{key} = {value!r}" for key, value in self.defaults.items() if given.get(key) is None]
        return f"from {self.path}: {', '.join(used)}" if used else ""

    def _not_allowed(self, spec: PoolSpec) -> Iterator[str]:
        for key, allowed in self.allowed.items():
            value = getattr(spec, key)
            values = value if key in _LISTS else () if value is None else (value,)
            for wrong in [one for one in values if one not in allowed]:
                yield f"[allowed] {key}: {wrong!r} is not one of {', '.join(map(str, allowed))}"

    def _too_large(self, spec: PoolSpec) -> Iterator[str]:
        for key, most in self.limits.items():
            value = getattr(spec, key)
            if value is not None and _MEASURES[key](value) > _MEASURES[key](most):
                yield f"[limits] {key}: {value} is more than {most}"

    def _refusal(self, name: str, problems: list[str]) -> InvalidInput:
        return InvalidInput(
            f"pool {name} does not fit what this site has decided",
            where=self.path,
            why="\n".join(problems),
            next="change these keys, or ask those who look after the cluster",
        )


def read_site() -> Site:
    """The site's file as it is now, checked; an empty one where there is none. Raises `InvalidInput`, naming file and key."""
    named = os.environ.get(SITE_VARIABLE)
    path = Path(named) if named else USUAL
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if named:
            raise InvalidInput("there is no site file", where=f"${SITE_VARIABLE} = {path}") from None
        return Site()
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(path, "", str(error)) from None
    try:
        site = msgspec.convert({**tomllib.loads(text), "path": str(path)}, Site)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise _wrong(path, "", str(error)) from None
    _check(path, site)
    return site


def _check(path: Path, site: Site) -> None:
    for key in site.required:
        _check_key(path, f"required, {key}", key)
    for key, value in site.defaults.items():
        _check_value(path, f"[defaults] {key}", key, value)
    for key, values in site.allowed.items():
        for value in values:
            _check_value(path, f"[allowed] {key}", key, [value] if key in _LISTS else value)
    for key, most in site.limits.items():
        if key not in _MEASURES:
            raise _wrong(path, f"[limits] {key}", f"what can be limited is {', '.join(_MEASURES)}")
        _check_value(path, f"[limits] {key}", key, most)


def _check_key(path: Path, place: str, key: str) -> None:
    if key not in _KEYS:
        raise _wrong(path, place, f"a pool has no key {key}; it has {', '.join(_KEYS)}")


def _check_value(path: Path, place: str, key: str, value: Any) -> None:
    """Whether a pool could have this value."""
    _check_key(path, place, key)
    try:
        msgspec.convert({"name": "", "model": "", key: value}, PoolSpec)
        if key in _MEASURES:
            _MEASURES[key](value)
    except msgspec.ValidationError as error:
        raise _wrong(path, place, str(error)) from None
    except InvalidInput as error:
        raise _wrong(path, place, "; ".join(filter(None, (error.what, error.next)))) from None


def _wrong(path: Path, place: str, why: str) -> InvalidInput:
    return InvalidInput(
        "the site file cannot be used",
        where=f"{path}, {place}" if place else str(path),
        why=why,
        next="those who look after the cluster can mend it; $NNSIGHT_HPC_SITE can name another file",
    )
