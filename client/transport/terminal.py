"""Whether there is a person to ask, and asking."""

from __future__ import annotations

import getpass
import sys


def at_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask_secret(prompt: str) -> str:
    return getpass.getpass(prompt, stream=sys.stderr)


def answers(title: str, instructions: str, prompts: list[tuple[str, bool]]) -> list[str]:
    """Answers to a server's questions (RFC 4256), each typed; what the server wants hidden is."""
    for text in filter(None, (title.strip(), instructions.strip())):
        print(text, file=sys.stderr)
    return [_ask_shown(prompt) if echo else ask_secret(prompt) for prompt, echo in prompts]


def _ask_shown(prompt: str) -> str:
    print(prompt, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().rstrip("\n")
