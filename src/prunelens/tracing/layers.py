"""L1 and L2: what every sublayer does to the same input, and how the deviation grows with depth.

One dense pass over the texts shows the residual stream before and after every sublayer. A dropped sublayer
leaves the stream as it was before, so it needs nothing more; a sublayer with other weights is run on the same
input while the dense pass goes by (L1). Then every compressed model reads the same texts, from its first
change on, and its streams are set beside the dense ones (L2). The logits of one dense stream serve all of
these, a few positions at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from prunelens.metrics.head import Stats, hidden_rows, merge
from prunelens.models.batches import pad_right, plan_batches
from prunelens.models.model import Model
from prunelens.models.surgery.variant import Variant, shared_batching
from prunelens.tracing.forced import Trajectory
from prunelens.tracing.layer_states import LayerStates, Places, read_layers
from prunelens.tracing.lens import LensReader

BATCH_TOKENS = 1024


@dataclass(frozen=True)
class LayerRows:
    """Row statistics of one trace of one compressed model, for every sublayer at the same steps.

    Attributes:
        trace: `local` (L1), `dropped` (L1, each sublayer of the dense model taken out) or `cumulative` (L2).
        label: the compressed model, `dense` in trace `dropped`.
        lens: `normed` or `raw`.
        sublayers: (layer_idx, kind) of the sublayers whose rows follow one another.
        steps: (index of the trajectory, step from 1) of the rows of each sublayer.
        stats: len(sublayers) * len(steps) values a column; h alone where nothing was read through a lens.
    """

    trace: str
    label: str
    lens: str
    sublayers: tuple[tuple[int, str], ...]
    steps: tuple[tuple[int, int], ...]
    stats: Stats


def even_steps(horizon: int, number: int) -> list[int]:
    """At most `number` of the steps 1 … horizon, evenly spread, both ends among them."""
    if number >= horizon:
        return list(range(1, horizon + 1))
    return sorted({round(step) for step in torch.linspace(1, horizon, number, dtype=torch.float64).tolist()})


def trace_layers(
    dense: Model,
    variants: Mapping[str, Variant],
    trajectories: Sequence[Trajectory],
    lenses: Sequence[str],
    steps: Sequence[int],
    temperature: float = 1.0,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] = lambda steps: None,
) -> Iterator[LayerRows]:
    """L1 and L2 of compressed models on texts of the dense one, batch by batch.

    Args:
        dense: the dense model.
        variants: compressed models by label, each aligned with the dense one (`Variant.aligned_with`).
        trajectories: the texts both models read.
        lenses: through which z and p are read at the sampled steps, of `normed` and `raw`.
        steps: the sampled steps; h of L2 is measured at all steps, with lens `raw`.
        temperature: T of the softmax.
        batch_tokens: tokens run at once.
        advance: called with the number of steps sampled in a finished batch.

    Yields:
        For each batch the rows of every trace, model and lens. Trace `local` has rows of models with weights of
        their own; what a recipe leaves of `dropped` is for the caller to choose.
    """
    readers = {name: LensReader(dense, variants, name, temperature) for name in lenses}
    lengths = [len(trajectory.read_ids) for trajectory in trajectories]
    batching = shared_batching(dense, variants.values())
    with torch.inference_mode():
        for batch in plan_batches(lengths, batch_tokens, batching):
            places = Places(trajectories, batch, set(steps))
            ids, _ = pad_right([trajectories[index].read_ids for index in batch], dense.device)
            states = read_layers(dense, variants, ids, places)
            names = tuple((part.layer_idx, part.kind) for part in states.sublayers)
            yield from _hidden_rows(states, places, names, sampled_too="raw" not in lenses)
            sampled = tuple(places.steps[place] for place in places.sampled.tolist())
            for lens, reader in readers.items():
                for (trace, label), stats in reader.read(states, places).items():
                    yield LayerRows(trace, label, lens, names, sampled, merge(stats))
            advance(len(sampled))


def _hidden_rows(
    states: LayerStates, places: Places, names: tuple[tuple[int, str], ...], sampled_too: bool
) -> Iterator[LayerRows]:
    """h of L2 at all steps, or at those that no lens has read."""
    chosen = set() if sampled_too else set(places.sampled.tolist())
    kept = [place for place in range(len(places.steps)) if place not in chosen]
    steps = tuple(places.steps[place] for place in kept)
    for label, streams in states.compressed_depth.items():
        stats = [
            hidden_rows(dense[kept], (dense if own is None else own)[kept])
            for dense, own in zip(states.depth, streams, strict=True)
        ]
        yield LayerRows("cumulative", label, "raw", names, steps, merge(stats))
