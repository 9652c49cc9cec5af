"""What a laptop needs of the model beside its weights, put where the daemon can hand it out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from nnsight_hpc.models import fingerprint
from nnsight_hpc.models.load import find_folder
from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.messages import ModelIdentity
from nnsight_hpc.wire.skeleton import skeleton_files

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.wire.pools import PoolSpec

logger = logging.getLogger(__name__)


def publish(spec: PoolSpec, folder: Path) -> ModelIdentity:
    """Copy the small files of the pool's model into `folder`, and say which model it is.

    A copy that cannot be made is logged, and no reason not to serve. Raises `NotFound` when there is no such model.
    """
    model = find_folder(spec.model, spec.revision)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in skeleton_files(model):
            write_atomically(folder / file.name, file.read_bytes())
    except (OSError, HpcError) as error:
        logger.warning("the model's configuration cannot be handed out: %s", error)
    return ModelIdentity(id=spec.model, fingerprint=fingerprint(model), revision=spec.revision)
