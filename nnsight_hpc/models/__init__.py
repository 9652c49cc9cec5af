"""Load, tokenise and fingerprint a model; its module tree on the meta device."""

from nnsight_hpc.models.fingerprint import fingerprint
from nnsight_hpc.models.inputs import pad_left, prepare_inputs
from nnsight_hpc.models.load import Loaded, load, load_tokenizer, module_tree, wrap

__all__ = ["Loaded", "fingerprint", "load", "load_tokenizer", "module_tree", "pad_left", "prepare_inputs", "wrap"]
