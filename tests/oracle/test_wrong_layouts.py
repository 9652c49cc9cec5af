"""The negative control: where a layout is made wrong on purpose, the tests of the API fail."""

from functools import partial

import pytest

from tests.oracle import test_gradients, test_points
from tests.oracle.architectures import make
from tests.oracle.compare import within_tolerances
from tests.oracle.degrees import Place
from tests.oracle.on_ranks import RanksBackend

NOTICES = {
    "reads": partial(test_points.test_reads_every_module_that_runs, kind="output"),
    "changes": partial(test_points.test_change_at_every_module_of_a_block, kind="output"),
    "gradients": test_gradients.test_gradient_at_every_module_of_a_block,
}
LLAMA, GPT2 = Place("llama", 2), Place("gpt2", 2)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("place", "wrong", "notices"),
    [
        (LLAMA, "JoinedBackwards", "reads"),
        (LLAMA, "JoinedBackwards", "changes"),
        (LLAMA, "TakenElsewhere", "changes"),
        (LLAMA, "TakenElsewhere", "gradients"),
        (GPT2, "NotPacked", "reads"),
        (GPT2, "NotPacked", "changes"),
        (GPT2, "NotPacked", "gradients"),
    ],
    ids=str,
)
def test_wrong_layout_is_noticed(replicas, saved, place, wrong, notices):
    """What passes with the layouts that were learnt fails with a wrong one, by its comparison and nothing else."""
    name, ranks = place
    for view in ("ShardedView", wrong):
        subject = make(name, RanksBackend(partial(replicas.of, ranks), saved / name, view=view, estimated=False))
        with within_tolerances():
            if view == wrong:
                with pytest.raises(AssertionError):
                    NOTICES[notices](subject)
            else:
                NOTICES[notices](subject)
