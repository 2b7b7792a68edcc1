"""Put back what drops took out, in closed form: each map is fitted on what the model with the earlier ones reads.

The part is still at work while its own map is fitted, so one run gives what it reads and what it adds. Only sums
are kept (`Moments`), and the streams in front of the next part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.models.anatomy.streams import BlockPass, SublayerPass, watched_blocks
from prunelens.models.batches import pad_right, plan_batches, with_tokens
from prunelens.models.model import Model
from prunelens.models.surgery.drop import Drop, remove
from prunelens.models.surgery.repairs import Repair
from prunelens.models.surgery.run_span import run_span
from prunelens.models.surgery.shared_copy import shared_copy_of
from prunelens.progress import Advance, unreported
from prunelens.pruning.least_squares import Affine, Moments, choose_strength, limit_rank, solve, squared_error
from prunelens.pruning.values import RepairForm

BATCH_TOKENS = 2048
EVERY = 5
"""One calibration text of so many is held out while the strength of the ridge is chosen."""

NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class RepairSpan:
    """Parts that are out and get one map: a sublayer, or blocks that follow one another.

    Attributes:
        kind: attention, mlp or block.
        first, last: layers, the same for a sublayer.
    """

    kind: str
    first: int
    last: int

    @property
    def drop(self) -> Drop:
        """What is out."""
        return Drop(**{self.kind: frozenset(range(self.first, self.last + 1))})


@dataclass(frozen=True)
class RepairFit:
    """How well a gap was repaired.

    Attributes:
        gap: what was out.
        strength: of the ridge, in units of the mean variance of the inputs; None for a bias.
        explained: share of ‖y‖² of what the part adds that is put back, on held-out calibration texts.
    """

    gap: RepairSpan
    strength: float | None
    explained: float


@dataclass
class Prefix:
    """What fits on the same texts share: streams in front of a block of the model as it is, and a metric.

    Attributes:
        at: the block.
        outputs: what the block before it returned for each batch.
        owner: the network whose streams they are.
        metric: M of its head (R4), once a fit has asked for it.
    """

    at: int = 0
    outputs: list[Any] = field(default_factory=list)
    owner: Any = None
    metric: Tensor | None = None


def find_gaps(model: Model, drop: Drop) -> list[RepairSpan]:
    """What is out, in the order in which a token passes it."""
    gaps: list[RepairSpan] = []
    for block in model.anatomy.blocks:
        layer_idx = block.layer_idx
        if layer_idx in drop.block:
            follows = gaps and gaps[-1].kind == "block" and gaps[-1].last == layer_idx - 1
            first = gaps.pop().first if follows else layer_idx
            gaps.append(RepairSpan("block", first, layer_idx))
            continue
        kinds = [part.kind for part in block.sublayers if layer_idx in getattr(drop, part.kind)]
        gaps += [RepairSpan(kind, layer_idx, layer_idx) for kind in kinds]
    return gaps


def num_block_runs(gaps: Sequence[RepairSpan]) -> int:
    """How many blocks each calibration token passes while the gaps are repaired."""
    reached = [0, *(gap.first for gap in gaps)]
    return sum(gap.first - before + gap.last - gap.first + 1 for gap, before in zip(gaps, reached, strict=False))


def fit_repairs(
    model: Model,
    form: RepairForm,
    drop: Drop,
    sequences: Sequence[Sequence[int]],
    metric: Tensor | None = None,
    prefix: Prefix | None = None,
    batch_tokens: int = BATCH_TOKENS,
    advance: Advance = unreported,
) -> tuple[list[Repair], list[RepairFit]]:
    """Fit a bias or a map for every part that is out, in order, so that each reads the repaired ones before it.

    Args:
        model: a model with all parts at work, which stays as it is.
        form: what is fitted.
        drop: what is out.
        sequences: token ids of the calibration texts.
        metric: M of the head, (d, d), for a weighted map of limited rank.
        prefix: streams of an earlier fit on the same texts.
        batch_tokens: tokens run at once.
        advance: called with the number of tokens that have passed a block, `num_block_runs` times each.

    Raises:
        PrunelensError: no calibration tokens, or a model that is offloaded.
    """
    working = shared_copy_of(model)
    walk = Walk(working, sequences, form.weighted, batch_tokens, advance)
    gaps = find_gaps(model, drop)
    if gaps:
        walk.reach(gaps[0].first, prefix)
    repairs, fitted = [], []
    for gap in gaps:
        fit, held_out = walk.moments(gap.first, gap.last, partial(read_gap, gap))
        repair, found = _fit(gap, form, fit, held_out, metric)
        repair = repair.in_dtype(model.dtype)
        remove(working.anatomy, gap.drop, [repair])
        repairs.append(repair)
        fitted.append(found)
    return repairs, fitted


def _fit(
    gap: RepairSpan, form: RepairForm, fit: Moments, held_out: Moments, metric: Tensor | None
) -> tuple[Repair, RepairFit]:
    both, metric = fit + held_out, None if metric is None else metric.to(fit.xx.device)
    if form.fit == "bias":
        error = squared_error(held_out, Affine(torch.zeros_like(fit.xy), fit.mean()))
        return Repair(gap.kind, gap.first, both.mean()), RepairFit(gap, None, explained(error, held_out))
    strength, error = choose_strength(fit, held_out)
    full = solve(both, strength)
    if form.rank is None:
        return Repair(gap.kind, gap.first, full.bias, full.weight), RepairFit(gap, strength, explained(error, held_out))
    down, up, bias = limit_rank(fit, solve(fit, strength), strength, form.rank, metric)
    error = squared_error(held_out, Affine(down @ up, bias))
    down, up, bias = limit_rank(both, full, strength, form.rank, metric)
    return Repair(gap.kind, gap.first, bias, down, up), RepairFit(gap, strength, explained(error, held_out))


def explained(error: float, held_out: Moments) -> float:
    """Share of the mean ‖y‖² that an error leaves out."""
    whole = float(held_out.yy / held_out.weight)
    return 1 - error / whole if whole else 1.0


Passes = dict[tuple[str, int], SublayerPass | BlockPass]
Read = Callable[[Passes], tuple[Tensor, Tensor, Tensor]]
"""From what ran to (inputs, targets, stream afterwards), (B, T, ·) each."""


def read_gap(gap: RepairSpan, passes: Passes) -> tuple[Tensor, Tensor, Tensor]:
    """What a part has read (its normed input, or a block's stream), what it has added, and the stream after it."""
    first, last = passes[gap.kind, gap.first], passes[gap.kind, gap.last]
    if isinstance(first, BlockPass):
        before = first.before.to(last.after.device)
        return before, last.after - before, last.after
    part = first.sublayer
    source = first.calls[part.chain.index(part.body[0])].source
    return source.reshape(first.before.shape), first.added, first.after


class Walk:
    """Carries the streams of all calibration texts from one place in a model to the next; never back.

    Args:
        model: a twin that is changed between the calls.
        sequences: token ids of the calibration texts.
        weighted: whether a token counts by d / ‖stream‖², as the final norm lets its residual count.
        batch_tokens: tokens run at once.
        advance: as in `fit_repairs`.
    """

    def __init__(
        self, model: Model, sequences: Sequence[Sequence[int]], weighted: bool, batch_tokens: int, advance: Advance
    ) -> None:
        self._model, self._weighted, self._advance = model, weighted, advance
        sequences = with_tokens(sequences)
        lengths = [len(sequence) for sequence in sequences]
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in plan_batches(lengths, batch_tokens, model.anatomy.batching):
            ids, own = pad_right([sequences[index] for index in batch], model.device)
            places = torch.arange(ids.shape[1], device=ids.device)
            real = places < own.unsqueeze(1)
            held = torch.tensor([index % EVERY == EVERY - 1 for index in batch], device=ids.device).unsqueeze(1)
            if len(sequences) < EVERY:
                held = places >= (own * (EVERY - 1) / EVERY).unsqueeze(1)  # too few texts: the end of each
            self._batches.append((ids, real & ~held, real & held))
        self._outputs: list[Any] = [None] * len(self._batches)
        self._at = self._counted = 0

    def reach(self, first: int, prefix: Prefix | None) -> None:
        """Carry the streams to the first block that changes, from where an earlier fit has left them if it can.

        Args:
            first: the block.
            prefix: what an earlier fit in the same batches has left, replaced by where this one begins.
        """
        if prefix is not None and prefix.outputs and prefix.at <= first:
            self._outputs, self._at = list(prefix.outputs), prefix.at
        with torch.no_grad():
            for index, (ids, *_) in enumerate(self._batches):
                self._outputs[index] = run_span(self._model, self._at, first, ids, self._outputs[index])
        self._at = first
        if prefix is not None:
            prefix.at, prefix.outputs = first, list(self._outputs)

    def moments(self, first: int, last: int, read: Read) -> tuple[Moments, Moments]:
        """Sums over the tokens that fit and over those that are held out, of what `read` finds in blocks first … last.

        The streams stay in front of block `first`, which is at least that of the call before.
        """
        found: list[Moments | None] = [None, None]
        blocks = self._model.anatomy.blocks[first : last + 1]
        with torch.no_grad():
            for index, (ids, *masks) in enumerate(self._batches):
                self._outputs[index] = run_span(self._model, self._at, first, ids, self._outputs[index])
                passes: Passes = {}
                with watched_blocks(blocks, partial(_note, passes)):
                    run_span(self._model, first, last + 1, ids, self._outputs[index])
                inputs, targets, after = read(passes)
                for place, mask in enumerate(masks):
                    sums, so_far = self._sum(inputs, targets, after, mask), found[place]
                    found[place] = sums if so_far is None else so_far + sums
                self._advance((last + 1 - self._counted) * int((masks[0] | masks[1]).sum()))
        self._at = self._counted = first
        fit, held_out = found
        assert fit is not None
        assert held_out is not None
        if not (fit + held_out).is_finite():
            raise PrunelensError(
                f"expected finite states of {self._model.name} on the calibration texts to fit a repair, found NaN or "
                f"infinity in layers {first} to {last}; use float32, or leave out the texts that overflow"
            )
        return fit, held_out if held_out.weight > 0 else fit

    def _sum(self, inputs: Tensor, targets: Tensor, after: Tensor, mask: Tensor) -> Moments:
        mask = mask.to(inputs.device)
        if self._weighted:
            weights = 1 / (after[mask].double().square().mean(-1) + NORM_EPSILON)
        else:
            weights = torch.ones(int(mask.sum()), device=inputs.device)
        return Moments.of(inputs[mask], targets[mask], weights)


def _note(passes: Passes, passed: BlockPass) -> None:
    passes["block", passed.block.layer_idx] = passed
    for part in passed.sublayers:
        passes[part.sublayer.kind, passed.block.layer_idx] = part
