"""Which weights of a matrix become zero, from their scores. A matrix is (rows, columns): one row an output, one column
an input.

The conventions are those of the published code of Wanda and SparseGPT. Among equal scores the lower column goes
first (a stable sort), but for a threshold over a whole matrix, which takes all that equal it.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunelens.pruning.values import Pattern


def lowest(scores: Float[Tensor, "rows columns"], pattern: Pattern, per: str) -> Bool[Tensor, "rows columns"]:
    """The weights that become zero.

    Args:
        scores: one for each weight.
        pattern: how many.
        per: `row` takes int(columns × ratio) of each row; `matrix` takes what is not above one threshold, itself
            included. With n:m both take n of each m columns.
    """
    if pattern.group:
        return smallest_of_groups(scores, pattern)
    if per == "matrix":
        return at_most_quantile(scores, pattern.ratio)
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
