"""What the researcher touches: models, envoys, values, contexts. Code in a ``with model.trace(…)`` block is recorded here."""

from nnsight_hpc.tracing import einops_backend
from nnsight_hpc.tracing.backend import Backend
from nnsight_hpc.tracing.language import LanguageModel
from nnsight_hpc.tracing.models import NNsight

einops_backend.install()

__all__ = ["Backend", "LanguageModel", "NNsight"]
