"""What a request says on its way to the daemon: nothing lost, nothing twice, not more than allowed."""

from __future__ import annotations

import threading

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.slurm.worker.said import LONGEST, MOST, Said
from nnsight_hpc.wire.messages import LogLine


def sent(said: Said) -> tuple[bytes, list[LogLine]]:
    """All that is to be sent, as a daemon puts it together, and its lines."""
    log = bytearray()
    while part := said.part():
        at, lines = part
        assert lines.endswith(b"\n")
        log[at : at + len(lines)] = lines
        said.has(len(lines))
    return bytes(log), [msgspec.json.decode(line, type=LogLine) for line in bytes(log).splitlines()]


@given(st.lists(st.text(), max_size=30))
def test_every_text_arrives_as_it_was(texts):
    """Line breaks, quotes and every other character included; what is no Unicode is replaced."""
    said = Said(1, lambda: None)
    for text in texts:
        said.say(text, "x.py:3")
    said_texts = [line.text for line in sent(said)[1]]
    assert [text.encode("utf-8", "replace").decode() for text in texts] == said_texts


def test_lone_surrogates_do_not_stop_a_request():
    """A file name that is no Unicode can be said."""
    said = Said(1, lambda: None)
    said.say("a\udcffb", "x.py:3")
    assert [line.text for line in sent(said)[1]] == ["a?b"]


def test_a_part_that_is_not_acknowledged_is_sent_again():
    """From the same place, with what has been said in the meantime."""
    said = Said(1, lambda: None)
    said.say("one", "")
    first = said.part()
    said.say("two", "")
    second = said.part()
    assert (first[0], second[0]) == (0, 0)
    assert second[1].startswith(first[1])
    assert second[1].count(b"\n") == 2


def test_more_than_allowed_is_dropped_and_says_so_once():
    """The log ends with one line that says that there would be more; a very long line is cut."""
    said = Said(1, lambda: None)
    for _ in range(3 * MOST // LONGEST):
        said.say("x" * (2 * LONGEST), "x.py:3")
    log, lines = sent(said)
    assert MOST < len(log) < MOST + 3 * LONGEST
    assert [False] * (len(lines) - 1) + [True] == [line.text.startswith("(the log ends here") for line in lines]
    assert lines[0].text.endswith(f"({LONGEST} characters more)")


def test_a_second_attempt_says_that_it_is_one():
    """Once, before its first line, and only when it says anything."""
    said = Said(2, lambda: None)
    assert said.part() is None
    said.say("one", "")
    said.say("two", "")
    assert [line.text.split(":")[0] for line in sent(said)[1]] == ["(attempt 2", "one", "two"]


def test_it_wakes_who_sends_when_there_is_something_new():
    """Once for lines that come faster than they are sent."""
    wakes = []
    said = Said(1, lambda: wakes.append(1))
    for _ in range(5):
        said.say("x", "")
    sent(said)
    said.say("y", "")
    assert len(wakes) == 2


def test_nothing_is_lost_between_two_threads():
    """Lines that are said while others are sent come in order, each once."""
    said, done = Said(1, lambda: None), threading.Event()

    def speak() -> None:
        for number in range(3000):
            said.say(str(number), "")
        done.set()

    thread = threading.Thread(target=speak)
    thread.start()
    lines: list[LogLine] = []
    while not done.is_set() or said.part():
        if part := said.part():
            lines += [msgspec.json.decode(line, type=LogLine) for line in part[1].splitlines()]
            said.has(len(part[1]))
    thread.join()
    assert [str(number) for number in range(3000)] == [line.text for line in lines]


def test_what_nobody_wants_is_forgotten():
    """After `close` nothing is kept and nothing more is taken."""
    said = Said(1, lambda: None)
    said.say("one", "")
    said.close()
    said.say("two", "")
    assert said.part() is None
