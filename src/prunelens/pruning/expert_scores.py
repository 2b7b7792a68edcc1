"""How much each expert of a mixture adds, and which experts to drop.

The score is REAP's (router-weighted expert activation pruning): the mean, over the tokens that the router sends to an
expert, of the weight the token gives it times the Euclidean norm of what the expert makes of the token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from prunelens.errors import PrunelensError
from prunelens.models.anatomy.hooks import decoder_of, run_decoder
from prunelens.models.batches import equal_batches, pad_right, with_tokens
from prunelens.models.model import Model
from prunelens.models.surgery.mixtures import Mixture, Routed, check_kept, find_mixtures, routed


@dataclass(frozen=True, eq=False)
class ExpertScores:
    """Of one mixture, on the CPU.

    Attributes:
        scores: mean of weight × ‖output‖₂ over the tokens sent to each expert; 0 where none was.
        counts: tokens sent to each expert.
    """

    scores: Float64[Tensor, " experts"]
    counts: Int64[Tensor, " experts"]


def score_experts(
    model: Model,
    sequences: Sequence[Sequence[int]],
    batch_tokens: int = 2048,
    advance: Callable[[int], None] = lambda tokens: None,
    mixtures: Mapping[int, Mixture] | None = None,
) -> dict[int, ExpertScores]:
    """Score every expert of every mixture on calibration texts, by layer_idx, in one pass.

    Only sequences of equal length run together, so that no padding is sent to an expert.

    Args:
        model: the dense model.
        sequences: token ids of the calibration texts.
        batch_tokens: tokens run at once.
        advance: called with the number of tokens read.
        mixtures: as `find_mixtures` gives them while all of them are at work; None to find them here.

    Raises:
        PrunelensError: no calibration tokens, no mixture, or one that is not supported.
    """
    sequences = with_tokens(sequences)
    mixtures = find_mixtures(model) if mixtures is None else mixtures
    totals = {
        layer_idx: (torch.zeros(mixture.num_experts, dtype=torch.float64), torch.zeros(mixture.num_experts).long())
        for layer_idx, mixture in mixtures.items()
    }
    handles = [
        mixture.experts.register_forward_pre_hook(_adder(*totals[layer_idx]), with_kwargs=True)
        for layer_idx, mixture in mixtures.items()
    ]
    try:
        with torch.inference_mode():
            for batch in equal_batches(sequences, batch_tokens, model.anatomy.batching):
                run_decoder(decoder_of(model.network), pad_right(batch, model.device)[0])
                advance(sum(map(len, batch)))
    finally:
        for handle in handles:
            handle.remove()
    return {
        layer_idx: ExpertScores(total / counts.clamp(min=1), counts) for layer_idx, (total, counts) in totals.items()
    }


def choose_experts(
    mixtures: Mapping[int, Mixture], fraction: float, scores: Mapping[int, ExpertScores] | None, seed: int = 0
) -> dict[int, tuple[int, ...]]:
    """The experts to drop in each layer, in ascending order: the int(experts × fraction) with the lowest scores.

    Where the router chooses among groups, each group loses int(experts in it × fraction). Among experts of equal
    score the one with the higher index goes first.

    Args:
        mixtures: as `find_mixtures` gives them.
        fraction: share of the experts of every layer that goes, between 0 and 1.
        scores: as `score_experts` gives them; None drops at random, as a control.
        seed: of the random choice.

    Raises:
        PrunelensError: a fraction that drops nothing, or leaves fewer experts than the router needs.
    """
    if not 0 < fraction < 1:
        raise PrunelensError(f"expected a fraction of experts to drop between 0 and 1, found {fraction}")
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for layer_idx, mixture in sorted(mixtures.items()):
        size = mixture.num_experts // mixture.num_groups
        count = int(size * fraction + 1e-9)  # 0.29 × 100 is 28.999… in floating point
        if count == 0:
            each = " in each group" if mixture.num_groups > 1 else ""
            raise PrunelensError(
                f"expected a fraction that drops at least one expert, found {fraction} of the {size}{each} in layer "
                f"{layer_idx}; ask for {1 / size:.4g} or more"
            )
        if scores is None:
            values = torch.rand(mixture.num_experts, generator=generator, dtype=torch.float64).tolist()
        else:
            values = scores[layer_idx].scores.tolist()
        gone = [expert for group in range(mixture.num_groups) for expert in _lowest(values, group, size, count)]
        check_kept(mixture, mixture.kept(gone))
        chosen[layer_idx] = tuple(sorted(gone))
    return chosen


def _lowest(values: Sequence[float], group: int, size: int, count: int) -> list[int]:
    """The `count` experts of a group with the lowest values, the higher index first among equals."""
    experts = range(group * size, (group + 1) * size)
    return sorted(experts, key=lambda expert: (values[expert], -expert))[:count]


def _adder(total: Tensor, counts: Tensor) -> Callable[..., None]:
    """A forward pre-hook of an experts module that adds weight × norm and the tokens of each expert."""

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = routed(args, kwargs)
        assert call is not None  # as it was when the mixture was found
        index = call.index.flatten().cpu()
        weighted = call.weights.flatten().double() * _norms(module, call)
        total.index_add_(0, index, weighted.cpu())
        counts.index_add_(0, index, torch.ones_like(index))

    return add


def _norms(experts: nn.Module, call: Routed) -> Tensor:
    """‖output‖₂ of each chosen expert before its weight, (tokens × top_k), each as a token of its own with weight 1."""
    top_k = call.index.shape[1]
    alone = call.states.repeat_interleave(top_k, dim=0)
    index, weights = call.index.reshape(-1, 1), torch.ones_like(call.weights).reshape(-1, 1)
    return experts.forward(alone, index, weights).double().norm(dim=-1)
