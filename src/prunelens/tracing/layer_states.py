"""The residual streams of a batch of texts around every sublayer, of the dense model and of compressed ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from prunelens.models.anatomy.hooks import decoder_of, record_outputs, replay_from, run_decoder
from prunelens.models.anatomy.parts import Sublayer
from prunelens.models.anatomy.streams import BlockPass, watched_blocks
from prunelens.models.model import Model
from prunelens.models.surgery.variant import Variant
from prunelens.tracing.forced import Trajectory


class Places:
    """Where in a batch the steps of its texts are.

    Attributes:
        steps: (index of the trajectory, step from 1) of every step in the batch.
        token_ids: the tokens these steps predict.
        sampled: which of them are read through the lens.
    """

    def __init__(self, trajectories: Sequence[Trajectory], batch: Sequence[int], chosen: set[int]) -> None:
        self.steps = [(index, step) for index in batch for step in range(1, len(trajectories[index].token_ids) + 1)]
        rows = [row for row, index in enumerate(batch) for _ in trajectories[index].token_ids]
        columns = [len(trajectories[index].prompt_ids) + step - 2 for index, step in self.steps]
        self._rows, self._columns = torch.tensor(rows), torch.tensor(columns)
        self.token_ids = torch.tensor([trajectories[index].token_ids[step - 1] for index, step in self.steps])
        self.sampled = torch.tensor(
            [place for place, (_, step) in enumerate(self.steps) if step in chosen], dtype=torch.int64
        )

    def means_into(self, target: Tensor, values: Tensor) -> None:
        """Put the mean of `values` (steps,) over the steps of each trajectory into its place in `target`."""
        start = 0
        for index, steps in groupby(index for index, _ in self.steps):
            stop = start + len(list(steps))
            target[index] = values[start:stop].mean()
            start = stop

    def of(self, states: Tensor, device: torch.device) -> Tensor:
        """The states (B, T, d) at these steps, (steps, d)."""
        return states[self._rows.to(states.device), self._columns.to(states.device)].to(device)


@dataclass
class LayerStates:
    """Residual streams at the steps of a batch, one entry per sublayer in order of depth.

    Attributes:
        sublayers: the dense model's sublayers.
        before: the stream each of them read, at the sampled steps, (K, d).
        after: the same with its output added (L1).
        twins: by label, the same with the output of the compressed model's sublayer on the same input.
        depth: the dense stream after each sublayer at all steps, (S, d); in a parallel block the second sublayer's
            is the block's output.
        compressed_depth: by label, the compressed model's stream there; None where nothing has changed yet.
    """

    sublayers: list[Sublayer] = field(default_factory=list)
    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    twins: dict[str, list[Tensor]] = field(default_factory=dict)
    depth: list[Tensor] = field(default_factory=list)
    compressed_depth: dict[str, list[Tensor | None]] = field(default_factory=dict)


def read_layers(dense: Model, variants: Mapping[str, Variant], ids: Tensor, places: Places) -> LayerStates:
    """Run the dense model and then each compressed one from its first change on, over right-padded ids (B, T)."""
    states = LayerStates()
    others = {label: variant.model for label, variant in variants.items() if variant.model is not dense}
    states.twins = {label: [] for label in others}
    starts = {label: _first_change(dense, variant) for label, variant in variants.items()}
    device = dense.device

    def visit(passed: BlockPass) -> None:
        for part, after in zip(passed.sublayers, _depths(passed), strict=True):
            states.sublayers.append(part.sublayer)
            states.before.append(places.of(part.before, device)[places.sampled])
            states.after.append(places.of(part.after, device)[places.sampled])
            states.depth.append(places.of(after, device))
            for label, model in others.items():
                twin = model.anatomy.blocks[passed.block.layer_idx].find(part.sublayer.kind)
                assert twin is not None
                states.twins[label].append(places.of(part.twin_after(twin), device)[places.sampled])

    wanted = sorted({start - 1 for start in starts.values() if start})
    with watched_blocks(dense.anatomy.blocks, visit), record_outputs(dense.layers, wanted) as recorded:
        run_decoder(decoder_of(dense.network), ids)
    for label, variant in variants.items():
        start = starts[label]
        output = recorded[start - 1] if start else None
        states.compressed_depth[label] = _read_variant(variant, ids, places, start, output, device)
    return states


def _first_change(dense: Model, variant: Variant) -> int:
    """The first layer to run; all of them where the model has weights of its own, none where nothing is dropped."""
    if variant.model is not dense:
        return 0
    first = variant.drop.first_layer
    return len(dense.anatomy.blocks) if first is None else first


def _read_variant(
    variant: Variant, ids: Tensor, places: Places, start: int, output: object, device: torch.device
) -> list[Tensor | None]:
    blocks = variant.model.anatomy.blocks
    found: list[Tensor | None] = [None for block in blocks[:start] for _ in block.sublayers]

    def visit(passed: BlockPass) -> None:
        found.extend(places.of(state, device) for state in _depths(passed))

    if start < len(blocks):
        with (
            variant.running() as model,
            replay_from(model.layers, start, output),
            watched_blocks(blocks[start:], visit),
        ):
            run_decoder(decoder_of(model.network), ids.to(model.device))
    return found


def _depths(passed: BlockPass) -> list[Tensor]:
    """The stream after each sublayer of a block, as it grows; the last is the block's output."""
    return [*(part.after for part in passed.sublayers[:-1]), passed.after]
