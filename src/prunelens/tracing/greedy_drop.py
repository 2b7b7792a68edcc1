"""The damage of taking one more sublayer out, for many sublayers at once (D1 on a model that has lost some already).

What lies before the candidate is shared with the run of what is out already, so a sweep over all sublayers costs
about half of its passes.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.metrics.head import Pair, stream_divergences
from prunelens.models.batches import pad_right, plan_batches
from prunelens.models.model import Model
from prunelens.models.surgery.drop import Drop, dropped
from prunelens.tracing.attribution import BATCH_TOKENS
from prunelens.tracing.forced import Edit, Trajectory, run_edits
from prunelens.tracing.layer_states import Places

Part = tuple[str, int]
"""(kind, layer_idx) of a sublayer: attention or mlp."""


def damage_of_drops(
    dense: Model,
    trajectories: Sequence[Trajectory],
    base: Drop,
    candidates: Sequence[Part],
    temperature: float = 1.0,
    advance: Callable[[int], None] = lambda steps: None,
) -> tuple[Float[Tensor, " trajectories"], dict[Part, Float[Tensor, " trajectories"]]]:
    """Mean KL(p‖p') over the steps of each trajectory, nats: with `base` out, and with each candidate out as well.

    Args:
        dense: the dense model.
        trajectories: the texts that are read.
        base: what is out already.
        candidates: what might go next.
        temperature: T of the softmax.
        advance: called with the number of steps compared, once for each candidate and once for the base.
    """
    parts: list[Part | None] = [None, *candidates]
    found = {part: torch.full((len(trajectories),), torch.nan, dtype=torch.float64) for part in parts}
    edits = [(layer_idx, _edit(dense, base | _drop((kind, layer_idx)))) for kind, layer_idx in candidates]
    lengths = [len(trajectory.read_ids) for trajectory in trajectories]
    with torch.inference_mode():
        for batch in plan_batches(lengths, BATCH_TOKENS, dense.anatomy.batching):
            ids, _ = pad_right([trajectories[index].read_ids for index in batch], dense.device)
            places = Places(trajectories, batch, set())
            states = places.of(next(iter(run_edits(dense, ids, []))), dense.device)
            runs = run_edits(dense, ids, edits, _edit(dense, base))
            pairs = [Pair(places.of(own, states.device), dense.head) for own in runs]
            for part, stats in zip(parts, stream_divergences(states, dense.head, pairs, temperature), strict=True):
                places.means_into(found[part], stats["kl_dense_compressed"])
            advance(len(places.steps) * len(parts))
    whole = found.pop(None)
    return whole, {part: values for part, values in found.items() if part is not None}


def _drop(part: Part) -> Drop:
    return Drop(**{part[0]: frozenset([part[1]])})


def _edit(dense: Model, drop: Drop) -> Edit:
    return partial(dropped, dense.anatomy, drop)
