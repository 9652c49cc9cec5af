"""What a steady client has measured, and a histogram of it in text."""

import json
from dataclasses import dataclass

_EDGES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 1.6, 2.4, 3.2, 6.4, float("inf"))
_BAR = 40


@dataclass(frozen=True)
class Asked:
    """One request: when it was due, when its result was there (seconds since the epoch)."""

    due: float
    done: float
    result: int
    error: str

    @property
    def seconds(self):
        return self.done - self.due

    def touches(self, window):
        """Whether it was under way at some time of the window."""
        return self.due <= window[1] and self.done >= window[0]


def read(path):
    return sorted((Asked(**json.loads(line)) for line in path.read_text().splitlines()), key=lambda one: one.due)


def quantile(asked, share):
    """The latency that `share` of the requests do not exceed."""
    seconds = sorted(one.seconds for one in asked)
    return seconds[min(len(seconds) - 1, int(share * len(seconds)))]


def in_words(name, asked):
    head = f"{name}: {len(asked)} requests"
    if not asked:
        return head
    shares = ", ".join(f"p{100 * share:g} {1000 * quantile(asked, share):.0f}" for share in (0.5, 0.9, 0.99))
    return f"{head}; milliseconds: {shares}, worst {1000 * quantile(asked, 1):.0f}"


def histogram(asked):
    """A line for each class of latency that occurs between the best and the worst, its bar on a scale of roots."""
    counts = [0] * len(_EDGES)
    for one in asked:
        counts[next(index for index, edge in enumerate(_EDGES) if one.seconds < edge)] += 1
    last = max(index for index, count in enumerate(counts) if count)
    most = max(counts) ** 0.5
    rows = zip((0.0, *_EDGES), _EDGES, counts, strict=False)
    return "\n".join(
        f"{1000 * low:6.0f} to {1000 * high:6.0f} ms {count:6} {'#' * round(_BAR * count**0.5 / most)}"
        for low, high, count in [*rows][: last + 1]
    )
