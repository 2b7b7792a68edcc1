"""N1, the noise floor: the dense model against itself, where only arithmetic differs.

A text is read alone, so each one costs a pass. Beyond `MOST_TEXTS` texts a sample serves: the floor differs more from
text to text than from step to step, so the texts are many and each gives a few steps of every depth.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.progress import Advance, unreported
from prunelens.tracing.forced import BATCH_TOKENS, Trajectory, forced_states

BATCH_SHAPE = "batch shape"
MOST_TEXTS = 24
MOST_POSITIONS = 384


@dataclass(frozen=True)
class NoiseSample:
    """The positions at which the dense model is compared with itself.

    Attributes:
        texts: the trajectories read, each cut behind its last sampled step.
        steps: (index among all trajectories, step from 1) of every sampled step, in order of the trajectories.
        rows: the sampled rows among those of all trajectories, (K,).
        own_rows: the sampled rows among those of `texts`, (K,).
        total: steps of all trajectories.
    """

    texts: tuple[Trajectory, ...]
    steps: tuple[tuple[int, int], ...]
    rows: Tensor
    own_rows: Tensor
    total: int

    @property
    def num_read(self) -> int:
        """Tokens that one reading of the sample takes."""
        return sum(len(text.read_ids) for text in self.texts)


def noise_sample(trajectories: Sequence[Trajectory], seed: int) -> NoiseSample:
    """All steps of all texts, or where those are too many a sample of both, spread evenly and drawn by the seed.

    At most `MOST_TEXTS` texts are read; where these have more than `MOST_POSITIONS` steps, each gives its share.
    """
    generator = random.Random(seed)
    chosen = _spread(len(trajectories), MOST_TEXTS, generator)
    share = max(1, MOST_POSITIONS // max(1, len(chosen)))
    whole = sum(len(trajectories[index].token_ids) for index in chosen) <= MOST_POSITIONS
    starts = [0]
    for text in trajectories:
        starts.append(starts[-1] + len(text.token_ids))
    texts, steps, rows, own_rows, read = [], [], [], [], 0
    for index in chosen:
        text = trajectories[index]
        places = _spread(len(text.token_ids), len(text.token_ids) if whole else share, generator)
        if not places:
            continue
        texts.append(replace(text, token_ids=text.token_ids[: places[-1] + 1]))
        steps += [(index, place + 1) for place in places]
        rows += [starts[index] + place for place in places]
        own_rows += [read + place for place in places]
        read += places[-1] + 1
    return NoiseSample(tuple(texts), tuple(steps), _places(rows), _places(own_rows), starts[-1])


def _places(rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def _spread(total: int, most: int, generator: random.Random) -> list[int]:
    """At most `most` of the places 0 … total - 1 in order, one drawn from each of equal stretches."""
    number = min(total, most)
    bounds = [place * total // number for place in range(number + 1)] if number else []
    return [generator.randrange(low, high) for low, high in pairwise(bounds)]


def sampled_states(
    model: Model, sample: NoiseSample, batch_tokens: int = BATCH_TOKENS, advance: Advance = unreported
) -> Tensor:
    """A model's states at the sampled steps, (K, d); `batch_tokens` 1 reads each text alone."""
    states = forced_states(model, sample.texts, batch_tokens=batch_tokens, advance=advance)[0]
    return states[sample.own_rows.to(states.device)]


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
