"""N1, the noise floor: the dense model against itself, where only arithmetic differs."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.progress import Advance, unreported
from prunelens.tracing.forced import Trajectory, forced_states

BATCH_SHAPE = "batch shape"


def other_batch_states(dense: Model, trajectories: Sequence[Trajectory], advance: Advance = unreported) -> Tensor:
    """The dense model's states, (T, d), when each text is read alone instead of in a batch with others."""
    return forced_states(dense, trajectories, batch_tokens=1, advance=advance)[0]


def in_dtype(dense: Model, dtype: torch.dtype) -> Model:
    """A copy of the dense model that computes in another dtype.

    Raises:
        PrunelensError: a model that is not in memory whole.
    """
    if any(weight.is_meta for weight in dense.network.parameters()):
        raise PrunelensError(
            f"expected {dense.name} in memory to compute in {str(dtype).removeprefix('torch.')} too, found parts of it "
            "offloaded; leave out --noise-dtype"
        )
    return replace(dense, network=copy.deepcopy(dense.network).to(dtype))
