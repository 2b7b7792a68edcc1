"""SparseGPT: set weights to zero and let those that are left make up for it, column by column."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.pruning.masks import at_most_quantile, smallest_of_groups
from prunelens.pruning.values import Pattern

BLOCK = 128
DAMPING = 0.01


@dataclass(frozen=True)
class Curvature:
    """How the outputs of a matrix depend on its weights, the same for all matrices with the same inputs.

    Attributes:
        factor: upper triangular U (columns, columns) with UᵀU = H⁻¹ of the damped H, float64.
        dead: inputs that were never other than 0, (columns,).
    """

    factor: Float[Tensor, "columns columns"]
    dead: Bool[Tensor, " columns"]


def curvature(products: Float[Tensor, "columns columns"], num_sequences: int) -> Curvature:
    """U of H = 2/n Σ x xᵀ, with 1 for dead inputs and 1 % of the mean added to the diagonal.

    Args:
        products: Σ x xᵀ over all calibration tokens.
        num_sequences: calibration sequences n.

    Raises:
        PrunelensError: the calibration tokens give no usable H (NaN or infinite inputs).
    """
    hessian = products.double() * (2 / num_sequences)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed) or not bool(torch.isfinite(lower).all()):
        raise PrunelensError(
            "expected finite activations on the calibration text, found values from which SparseGPT cannot be "
            "computed; use --dtype float32, or another calibration text"
        )
    return Curvature(torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True), dead)


def sparsegpt_weight(
    weight: Float[Tensor, "rows columns"], inputs: Curvature, pattern: Pattern
) -> Float[Tensor, "rows columns"]:
    """The sparse weight that changes the outputs on the calibration tokens least, as SparseGPT finds it.

    Args:
        weight: the matrix, rows are outputs.
        inputs: the curvature of what it reads.
        pattern: how many zeros: a share of each 128 columns (one threshold over all rows), or n of each m inputs.
    """
    factor = inputs.factor.to(torch.promote_types(weight.dtype, torch.float32))
    columns = weight.to(factor.dtype).T.contiguous()  # (columns, rows), so that a column lies together
    columns = columns.masked_fill(inputs.dead.unsqueeze(1), 0)
    width = BLOCK // pattern.group * pattern.group if pattern.group else BLOCK
    for start in range(0, len(columns), width):
        stop = min(start + width, len(columns))
        errors = _prune_columns(columns[start:stop], factor[start:stop, start:stop], pattern)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return columns.T.to(weight.dtype)


def _prune_columns(columns: Tensor, factor: Tensor, pattern: Pattern) -> Tensor:
    """Prune a block of columns (columns, rows) in place; returns their errors, which the columns after it take up."""
    pivots = factor.diagonal()
    scales = pivots.square().unsqueeze(1)
    errors = torch.empty_like(columns)
    mask = torch.empty(0)
    if not pattern.group:
        mask = at_most_quantile(columns.square() / scales, pattern.ratio)
    for place, column in enumerate(columns):
        if pattern.group and place % pattern.group == 0:
            group = slice(place, place + pattern.group)
            mask = smallest_of_groups((columns[group].square() / scales[group]).T, pattern).T
        zeros = mask[place % pattern.group if pattern.group else place]
        errors[place] = torch.where(zeros, column / pivots[place], 0)
        column.masked_fill_(zeros, 0)
        columns[place + 1 :].addr_(factor[place, place + 1 :], errors[place], alpha=-1)
    return errors
