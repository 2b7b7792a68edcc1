"""SparseGPT: set weights to zero and let those that are left make up for it, column by column."""

import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.pruning.masks import at_most_quantile, smallest_of_groups
from prunelens.pruning.steps import Pattern

BLOCK = 128
DAMPING = 0.01


def sparsegpt_weight(
    weight: Float[Tensor, "rows columns"],
    products: Float[Tensor, "columns columns"],
    num_sequences: int,
    pattern: Pattern,
) -> Float[Tensor, "rows columns"]:
    """The sparse weight that changes the outputs on the calibration tokens least, as SparseGPT finds it.

    Args:
        weight: the matrix, rows are outputs.
        products: Σ x xᵀ over all calibration tokens.
        num_sequences: calibration sequences n; H = 2/n Σ x xᵀ.
        pattern: how many zeros: a share of each 128 columns (one threshold over all rows), or n of each m inputs.

    Raises:
        PrunelensError: the calibration tokens give no usable H (NaN or infinite inputs).
    """
    hessian = products.double() * (2 / num_sequences)
    dead = hessian.diagonal() == 0
    factor = _inverse_factor(hessian, dead).to(torch.promote_types(weight.dtype, torch.float32))
    columns = (
        weight.to(factor.dtype).T.contiguous().masked_fill(dead.unsqueeze(1), 0)
    )  # (columns, rows): a column lies together
    width = BLOCK // pattern.group * pattern.group if pattern.group else BLOCK
    for start in range(0, len(columns), width):
        stop = min(start + width, len(columns))
        errors = _prune_columns(columns[start:stop], factor[start:stop, start:stop], pattern)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return columns.T.to(weight.dtype)


def _inverse_factor(hessian: Tensor, dead: Tensor) -> Tensor:
    """The upper triangular U with UᵀU = H⁻¹, of the damped H."""
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed) or not bool(torch.isfinite(lower).all()):
        raise PrunelensError(
            "expected finite activations on the calibration text, found values from which SparseGPT cannot be "
            "computed; use --dtype float32, or another calibration text"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


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
