"""One small model of each architecture for the tests of a file; none may have a hook left when a test ends."""

import pytest

from tests.oracle.architectures import ARCHITECTURES, ATTENTION, FLATTENED, LANGUAGE, make
from tests.oracle.hooks import hooks_of


def _models(names):
    @pytest.fixture(scope="module", params=names)
    def model(request):
        return make(request.param)

    return model


any_model = _models(tuple(ARCHITECTURES))
"""Every architecture."""
lm = _models(LANGUAGE)
"""Those that are causal language models of transformers."""
attentive = _models(ATTENTION)
"""Those with attention, which returns a tuple."""
flattening = _models(FLATTENED)
"""Those with modules that see batch times tokens as one dimension."""


@pytest.fixture(scope="module")
def llama():
    """For what does not depend on the architecture."""
    return make("llama")


@pytest.fixture(autouse=True)
def _no_hooks_left(request):
    yield
    for name in ("any_model", "lm", "attentive", "flattening", "llama"):
        if name in request.fixturenames:
            assert hooks_of(request.getfixturevalue(name).module) == []
