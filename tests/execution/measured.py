"""How much memory a run takes, as torch's allocator counts it."""

import itertools

from torch.profiler import ProfilerActivity, profile


def peak_of(run):
    """The most bytes of tensors that were allocated at a time, above those of the beginning.

    It is the larger of two measurements: a profile has been seen to miss some, and what is freed in the run of what was there
    before makes it smaller.
    """
    return max(_peak(run) for _ in range(2))


def _peak(run):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
