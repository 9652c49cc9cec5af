"""The options of a generation, made explicit: how many tokens at most, and the seed of what is drawn."""

from __future__ import annotations

from typing import Any

from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.wire.errors import InvalidInput

_DEFAULT_NEW_TOKENS = 20
"""As in transformers, where neither the model nor the researcher says more."""


def generation_options(given: dict[str, Any], defaults: Any) -> dict[str, Any]:
    """The researcher's keywords with the length and the sampling that the model's own `defaults` add.

    Raises `InvalidInput` for sampling without a seed: what is drawn must not hang on the state of the process that runs it.
    """
    options = dict(given)
    if options.get("max_new_tokens") is None and options.get("max_length") is None:
        longest = getattr(defaults, "max_new_tokens", None)
        whole = getattr(defaults, "max_length", None)
        options |= (
            {"max_length": whole} if longest is None and whole else {"max_new_tokens": longest or _DEFAULT_NEW_TOKENS}
        )
    if options.setdefault("do_sample", bool(getattr(defaults, "do_sample", False))) and "seed" not in options:
        raise InvalidInput(
            "a generation that samples needs a seed",
            where=str(users_line()),
            why="" if "do_sample" in given else "this model samples unless it is told not to",
            next="write seed=0, or another number; or do_sample=False for the most likely tokens",
        )
    return options


def bounded(options: dict[str, Any], prompt_tokens: int | None) -> dict[str, Any]:
    """Options with ``max_new_tokens`` in place of ``max_length``, for a prompt of that length."""
    if options.get("max_new_tokens") is not None or prompt_tokens is None:
        return options
    others = {name: value for name, value in options.items() if name not in ("max_length", "max_new_tokens")}
    return {**others, "max_new_tokens": max(options["max_length"] - prompt_tokens, 1)}
