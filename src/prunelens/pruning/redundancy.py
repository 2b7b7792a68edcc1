"""How redundant each attention, MLP and block is, by a ranking of the residual stream before and after it.

The built-in score is LLM-Drop's: the cosine, the residual included on both sides. Any score is averaged over all
calibration tokens, and one pass of the model gives all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunelens.models.anatomy.hooks import decoder_of, run_decoder
from prunelens.models.anatomy.streams import BlockPass, watched_blocks
from prunelens.models.batches import pad_right, plan_batches, with_tokens
from prunelens.models.model import Model
from prunelens.pruning.calling import part_score
from prunelens.pruning.methods import COSINE, Method, PartStates
from prunelens.pruning.plugins import find_ranking

Key = tuple[str, int]
"""(kind, layer_idx) with kind attention, mlp or block."""


@dataclass(frozen=True)
class Ranking:
    """Mean score of every sublayer and block, higher = more redundant; of the cosine, 1 = changes nothing."""

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
    by: str = COSINE,
) -> Ranking:
    """Score every attention, MLP and block on calibration texts, in one pass.

    Args:
        model: the dense model.
        sequences: token ids of the calibration texts.
        batch_tokens: tokens run at once.
        advance: called with the number of tokens read.
        by: the name of a ranking.

    Raises:
        PrunelensError: no calibration tokens, an unknown ranking, or one from outside that fails.
    """
    method, sequences = find_ranking(by), with_tokens(sequences)
    totals: dict[Key, float] = {}
    with torch.inference_mode():
        for batch in plan_batches([len(sequence) for sequence in sequences], batch_tokens, model.anatomy.batching):
            ids, lengths = pad_right([sequences[index] for index in batch], model.device)
            real = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
            for key, value in _batch_scores(method, model, ids, real).items():
                totals[key] = totals.get(key, 0.0) + value
            advance(int(lengths.sum()))
    num_tokens = sum(len(sequence) for sequence in sequences)
    return Ranking({key: total / num_tokens for key, total in totals.items()}, num_tokens)


def _batch_scores(method: Method, model: Model, ids: Tensor, real: Tensor) -> dict[Key, float]:
    """Sums over real tokens of the scores, for one right-padded batch."""
    scores: dict[Key, float] = {}

    def score(kind: str, layer_idx: int, before: Tensor, after: Tensor) -> None:
        part = PartStates(kind, layer_idx, _tokens(before, real), _tokens(after, real))
        scores[kind, layer_idx] = part_score(method, part)

    def visit(passed: BlockPass) -> None:
        layer_idx = passed.block.layer_idx
        score("block", layer_idx, passed.before, passed.after)
        for part in passed.sublayers:
            score(part.sublayer.kind, layer_idx, part.before, part.after)

    with watched_blocks(model.anatomy.blocks, visit):
        run_decoder(decoder_of(model.network), ids)
    return scores


def _tokens(states: Tensor, real: Tensor) -> Tensor:
    """The states of real tokens, (tokens, d), float32 at least."""
    return states[real.to(states.device)].to(torch.promote_types(states.dtype, torch.float32))
