"""What the search did not see: KL on other prompts, against cosine and chance, and the tasks' other items."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from prunelens.metrics.head import Pair, stream_divergences
from prunelens.metrics.intervals import mean_interval
from prunelens.models.model import Model
from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.variant import Variant
from prunelens.pruning.redundancy import Ranking
from prunelens.study.evaluate.scores import as_dict
from prunelens.tracing.forced import Trajectory, forced_states

NUM_RANDOM = 3


def cosine_drop(drop: Drop, ranking: Ranking) -> Drop:
    """The drop of the same size, kind by kind, that the cosine ranking chooses."""
    chosen = {
        kind: frozenset(index for _, index in ranking.ordered(kind)[: len(getattr(drop, kind))])
        for kind in ("attention", "mlp")
    }
    return Drop(**chosen)


def random_drops(drop: Drop, model: Model, seed: int) -> list[Drop]:
    """Drops of the same size, kind by kind, at random."""
    generator = random.Random(seed)
    layers = {
        kind: [block.layer_idx for block in model.anatomy.blocks if block.find(kind)] for kind in ("attention", "mlp")
    }
    return [
        Drop(
            **{
                kind: frozenset(generator.sample(layers[kind], len(getattr(drop, kind))))
                for kind in ("attention", "mlp")
            }
        )
        for _ in range(NUM_RANDOM)
    ]


def kl_by_prompt(dense: Model, trajectories: Sequence[Trajectory], variants: Sequence[Variant]) -> list[list[float]]:
    """Mean KL(p‖p') over the steps of each trajectory, nats, for each variant."""
    drops = [variant.drop for variant in variants if variant.model is dense]
    states, *dropped = forced_states(dense, trajectories, drops)
    own = iter(dropped)
    pairs = [
        Pair(
            next(own) if variant.model is dense else forced_states(variant.model, trajectories)[0],
            variant.model.head,
        )
        for variant in variants
    ]
    lengths = [len(trajectory.token_ids) for trajectory in trajectories]
    with torch.inference_mode():
        found = stream_divergences(states, dense.head, pairs, 1.0)
    return [[float(part.mean()) for part in stats["kl_dense_compressed"].split(lengths)] for stats in found]


def compared(kl: Mapping[str, Sequence[float]], left: str, right: str) -> dict[str, Any]:
    """KL of one recipe against another's on the same prompts: both means, the difference, and which is better."""
    difference = mean_interval(np.asarray(kl[left], float) - np.asarray(kl[right], float))
    better = left if difference.high < 0 else right if difference.low > 0 else None
    return {"left": left, "right": right, "difference": as_dict(difference), "better": better}


def mean_kl(values: Sequence[float]) -> dict[str, float]:
    """Mean over prompts with its interval."""
    return as_dict(mean_interval(np.asarray(values, float)))
