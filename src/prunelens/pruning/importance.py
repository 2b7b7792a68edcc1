"""How redundant each attention, MLP and block is: the cosine of the residual stream before and after it.

The score is LLM-Drop's: the residual is included on both sides, and the cosine is averaged over all
calibration tokens. One pass of the model gives all scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunelens.errors import PrunelensError, shown
from prunelens.models.anatomy.hooks import decoder_of, run_decoder
from prunelens.models.anatomy.streams import BlockPass, watched_blocks
from prunelens.models.batches import pad_right, plan_batches, with_tokens
from prunelens.models.model import Model
from prunelens.models.surgery.drop import Drop
from prunelens.pruning.recipe import Recipe
from prunelens.pruning.steps import Step

Key = tuple[str, int]
"""(kind, layer_idx) with kind attention, mlp or block."""


@dataclass(frozen=True)
class Ranking:
    """Mean cosine of input and output (residual included) of every sublayer and block; 1 = changes nothing."""

    scores: dict[Key, float]
    num_tokens: int

    def ordered(self, *kinds: str) -> list[Key]:
        """Most redundant first; among equals the lower layer first."""
        keys = [key for key in self.scores if key[0] in kinds]
        return sorted(keys, key=lambda key: (-self.scores[key], key[1], key[0]))


def rank_redundancy(
    model: Model,
    sequences: Sequence[Sequence[int]],
    batch_tokens: int = 2048,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Ranking:
    """Score every attention, MLP and block on calibration texts, in one pass.

    Args:
        model: the dense model.
        sequences: token ids of the calibration texts.
        batch_tokens: tokens run at once.
        advance: called with the number of tokens read.

    Raises:
        PrunelensError: no calibration tokens.
    """
    sequences = with_tokens(sequences)
    totals: dict[Key, float] = {}
    with torch.inference_mode():
        for batch in plan_batches([len(sequence) for sequence in sequences], batch_tokens, model.anatomy.batching):
            ids, lengths = pad_right([sequences[index] for index in batch], model.device)
            real = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
            for key, value in _batch_scores(model, ids, real).items():
                totals[key] = totals.get(key, 0.0) + value
            advance(int(lengths.sum()))
    num_tokens = sum(len(sequence) for sequence in sequences)
    return Ranking({key: total / num_tokens for key, total in totals.items()}, num_tokens)


def _batch_scores(model: Model, ids: Tensor, real: Tensor) -> dict[Key, float]:
    """Sums over real tokens of the cosines, for one right-padded batch."""
    scores: dict[Key, float] = {}

    def score(pass_: BlockPass) -> None:
        layer_idx = pass_.block.layer_idx
        scores["block", layer_idx] = _cosine_sum(pass_.before, pass_.after, real)
        for part in pass_.sublayers:
            scores[part.sublayer.kind, layer_idx] = _cosine_sum(part.before, part.after, real)

    with watched_blocks(model.anatomy.blocks, score):
        run_decoder(decoder_of(model.network), ids)
    return scores


def _cosine_sum(before: Tensor, after: Tensor, real: Tensor) -> float:
    cosines = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1, eps=1e-300)
    return float(cosines[real.to(cosines.device)].sum())


def choose(step: Step, model: Model, ranking: Ranking | None, drop: Drop) -> Drop:
    """The parts that a step takes out of what is left: those it names, or the most redundant.

    Args:
        step: what to take out.
        model: the model it refers to.
        ranking: its scores; needed when the step gives a count.
        drop: what is out already.

    Raises:
        PrunelensError: too few parts are left for a count.
    """
    chosen = step.parts if step.at is not None else _ranked(step, model, ranking, drop)
    found = Drop()
    for kind, layer_idx in chosen:
        found |= Drop(**{kind: frozenset([layer_idx])})
    return found


def check_parts(recipe: Recipe, model: Model) -> None:
    """Refuse, before anything runs, a recipe that asks for parts the model does not have.

    Raises:
        PrunelensError: an index out of range, a part named twice, a count beyond the number of parts, or nothing left.
    """
    named: set[Key] = set()
    counted: dict[tuple[str, ...], int] = {}
    for step in recipe.drops:
        for kind, layer_idx in step.parts:
            if layer_idx not in _layers(kind, model):
                raise PrunelensError(
                    f"recipe {shown(str(step))}: expected a layer index from 0 to {len(model.anatomy.blocks) - 1} "
                    f"that has {kind}, found {layer_idx}"
                )
            if _overlaps((kind, layer_idx), named):
                raise PrunelensError(f"recipe {shown(str(recipe))} takes out {kind} {layer_idx} twice")
            named.add((kind, layer_idx))
        if step.count is not None:
            _check_count(step, model, named, counted)
    sizes = {block.layer_idx: len(block.sublayers) for block in model.anatomy.blocks}
    if sum(_fewest_out(step, sizes) for step in recipe.drops) >= sum(sizes.values()):
        raise _nothing_left(recipe, model)


def check_left(recipe: Recipe, model: Model, drop: Drop) -> None:
    """Refuse what was chosen if no sublayer of the model is left.

    Raises:
        PrunelensError: as said.
    """
    parts = [(part.kind, block.layer_idx) for block in model.anatomy.blocks for part in block.sublayers]
    if all(layer_idx in getattr(drop, kind) | drop.block for kind, layer_idx in parts):
        raise _nothing_left(recipe, model)


def _fewest_out(step: Step, sizes: dict[int, int]) -> int:
    """How many sublayers a step takes out at least; the steps of a recipe take no part twice."""
    if step.count is None:
        return sum(sizes[layer_idx] if kind == "block" else 1 for kind, layer_idx in step.parts)
    return sum(sorted(sizes.values())[: step.count]) if step.kinds == ("block",) else step.count


def _nothing_left(recipe: Recipe, model: Model) -> PrunelensError:
    return PrunelensError(
        f"recipe {shown(str(recipe))} takes out every attention and MLP of {model.name}, so that nothing is left to "
        "run; leave at least one"
    )


def _overlaps(key: Key, named: set[Key]) -> bool:
    kind, layer_idx = key
    others = ("attention", "mlp", "block") if kind == "block" else (kind, "block")
    return any((other, layer_idx) in named for other in others)


def _check_count(step: Step, model: Model, named: set[Key], counted: dict[tuple[str, ...], int]) -> None:
    assert step.count is not None
    keys = [(kind, layer_idx) for kind in step.kinds for layer_idx in _layers(kind, model)]
    left = sum(not _overlaps(key, named) for key in keys) - counted.get(step.kinds, 0)
    if step.count > left:
        gone = f", of which {left} parts are left" if left < len(keys) else ""
        raise PrunelensError(
            f"recipe {shown(str(step))} asks for {step.count}{' consecutive' if step.consecutive else ''} parts, but "
            f"{model.name} has {len(keys)} ({' + '.join(step.kinds)}){gone}"
        )
    counted[step.kinds] = counted.get(step.kinds, 0) + step.count


def _layers(kind: str, model: Model) -> list[int]:
    return [block.layer_idx for block in model.anatomy.blocks if kind == "block" or block.find(kind)]  # type: ignore[arg-type]


def _ranked(step: Step, model: Model, ranking: Ranking | None, drop: Drop) -> list[Key]:
    assert ranking is not None
    assert step.count is not None
    if step.consecutive:
        return _best_run(step.count, model, ranking, drop)
    left = [key for key in ranking.ordered(*step.kinds) if not _touches(key, drop)]
    if len(left) < step.count:
        raise PrunelensError(f"recipe {str(step)!r}: only {len(left)} parts are left to take out")
    return left[: step.count]


def _touches(key: Key, drop: Drop) -> bool:
    kind, layer_idx = key
    if kind == "block":
        return layer_idx in drop.block | drop.attention | drop.mlp
    return layer_idx in getattr(drop, kind) | drop.block


def _best_run(count: int, model: Model, ranking: Ranking, drop: Drop) -> list[Key]:
    """The run of blocks with the highest mean score."""
    runs = [
        [("block", layer_idx) for layer_idx in range(start, start + count)]
        for start in range(len(model.anatomy.blocks) - count + 1)
    ]
    free = [run for run in runs if not any(_touches(key, drop) for key in run)]
    if not free:
        raise PrunelensError(f"no run of {count} consecutive blocks is left to take out")
    return max(free, key=lambda run: sum(ranking.scores[key] for key in run))
