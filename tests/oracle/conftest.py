"""One small model of each architecture for the tests of a file, in this process and on ranks; no hook may stay on it."""

from contextlib import nullcontext
from functools import partial

import pytest

from tests.oracle.architectures import ARCHITECTURES, ATTENTION, FLATTENED, LANGUAGE, bare, make
from tests.oracle.compare import within_tolerances
from tests.oracle.degrees import SOME, SPLIT, places
from tests.oracle.hooks import hooks_of
from tests.oracle.on_ranks import RanksBackend


@pytest.fixture(scope="session")
def replicas(test_session):
    """Ranks, that many as are asked for; they end with the tests."""
    from tests.parallel.replica import Replicas

    made = Replicas()
    yield made
    made.close()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folder of each architecture that can be split."""
    folder = tmp_path_factory.mktemp("models")
    for name in {*SPLIT} & {*ARCHITECTURES}:
        bare(name).save_pretrained(folder / name)
    return folder


def _models(names):
    @pytest.fixture(scope="module", params=places(names))
    def model(request):
        name, ranks = request.param
        if ranks == 1:
            return make(name)
        replica = partial(request.getfixturevalue("replicas").of, ranks)
        folder = request.getfixturevalue("saved") / name
        return make(name, RanksBackend(replica, folder, estimated=ranks == max(SOME)))  # takes longer than the graph

    return model


any_model = _models(tuple(ARCHITECTURES))
"""Every architecture."""
lm = _models(LANGUAGE)
"""Those that are causal language models of transformers."""
attentive = _models(ATTENTION)
"""Those with attention, which returns a tuple."""
flattening = _models(FLATTENED)
"""Those with modules that see batch times tokens as one dimension."""
llama = _models(("llama",))
"""For what does not depend on the architecture."""
_FIXTURES = ("any_model", "lm", "attentive", "flattening", "llama")


@pytest.fixture(autouse=True)
def _compared_as_it_ran(request):
    """Values from ranks may be off in the last bits; a test on ranks that sends them nothing belongs into one process."""
    subjects = [request.getfixturevalue(name) for name in _FIXTURES if name in request.fixturenames]
    on_ranks = [(subject.ranks, subject.ranks.asked) for subject in subjects if subject.ranks]
    with within_tolerances() if on_ranks else nullcontext():
        yield
    assert [path for subject in subjects for path in hooks_of(subject.module)] == []
    assert all(ranks.asked > before for ranks, before in on_ranks), "the ranks were not asked: mark it in_one_process"
