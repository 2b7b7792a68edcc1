"""Which weights of a matrix become zero. A matrix is (rows, columns): one row an output, one column an input.

The conventions are those of the published code of Wanda and SparseGPT. Among equal scores the lower column goes
first (a stable sort), but for magnitude's threshold, which takes all that equal it.
"""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from prunelens.pruning.steps import Pattern


def magnitude_mask(weight: Float[Tensor, "rows columns"], pattern: Pattern) -> Bool[Tensor, "rows columns"]:
    """The smallest weights: one threshold for the whole matrix, which itself becomes zero too, or n of each m."""
    sizes = weight.abs()
    return smallest_of_groups(sizes, pattern) if pattern.group else at_most_quantile(sizes, pattern.ratio)


def wanda_mask(
    weight: Float[Tensor, "rows columns"], squares: Float64[Tensor, " columns"], pattern: Pattern
) -> Bool[Tensor, "rows columns"]:
    """The smallest |W|·‖x‖₂ (float32) of each row, int(columns × ratio) of them, or n of each m inputs.

    Args:
        weight: the matrix.
        squares: Σ x² of each input over all calibration tokens.
        pattern: how many.
    """
    scores = weight.abs().float() * squares.sqrt().float()
    if pattern.group:
        return smallest_of_groups(scores, pattern)
    return smallest_of_rows(scores, int(scores.shape[1] * pattern.ratio))


def at_most_quantile(scores: Float[Tensor, "rows columns"], ratio: float) -> Bool[Tensor, "rows columns"]:
    """Scores up to the one at place int(number × ratio) in ascending order, that one included."""
    threshold = scores.flatten().kthvalue(int(scores.numel() * ratio) + 1).values
    return scores <= threshold


def smallest_of_rows(scores: Float[Tensor, "rows columns"], count: int) -> Bool[Tensor, "rows columns"]:
    """The `count` smallest of each row, as the first of a stable sort."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    mask = scores < threshold
    tied = scores == threshold
    missing = count - mask.sum(dim=1, keepdim=True)
    if bool((tied.sum(dim=1, keepdim=True) == missing).all()):
        return mask | tied
    return mask | (tied & (tied.cumsum(dim=1) <= missing))


def smallest_of_groups(scores: Float[Tensor, "rows columns"], pattern: Pattern) -> Bool[Tensor, "rows columns"]:
    """The n smallest of each m consecutive columns, as the first of a stable sort; m divides the columns."""
    groups = scores.unflatten(1, (-1, pattern.group))
    places = torch.arange(pattern.group, device=scores.device)
    rank = torch.zeros_like(groups, dtype=torch.uint8)
    for other in range(pattern.group):
        value = groups[..., other : other + 1]
        rank += (value < groups) | ((value == groups) & (other < places))
    return (rank < pattern.zeros).flatten(1)
