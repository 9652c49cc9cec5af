"""What the researcher touches: models, envoys, values, contexts. Code in a ``with model.trace(…)`` block is recorded here."""

from nnsight_hpc.tracing.backend import Backend
from nnsight_hpc.tracing.models import LanguageModel, NNsight

__all__ = ["Backend", "LanguageModel", "NNsight"]
