"""Deviation of one vector from another: cosine, parallel and orthogonal part (H1, H2, T1, Z1)."""

import torch
from jaxtyping import Float64
from torch import Tensor


def cosine_from_split(
    alpha: Float64[Tensor, "*rows"], rho_squared: Float64[Tensor, "*rows"]
) -> tuple[Float64[Tensor, "*rows"], Float64[Tensor, "*rows"]]:
    """Cosine and `1 - cosine` between v and v + Δv from the split of Δv (T1, exact form).

    With Δv = αv + Δv⊥ and ρ = ‖Δv⊥‖/‖v‖ the cosine is (1+α)/√((1+α)²+ρ²). The deviation is computed
    without subtracting from one, so it keeps its relative accuracy when the vectors nearly agree, and
    is exactly 0 for Δv = 0.

    Returns:
        (cosine, deviation), each with the shape of `alpha`, dimensionless.
    """
    along = 1 + alpha
    length = torch.sqrt(along**2 + rho_squared)
    cosine = along / length
    # 1 - a/L = (L² - a²) / (L (L + a)) = ρ² / (L (L + a)) loses nothing for a > 0.
    deviation = torch.where(along > 0, rho_squared / (length * (length + along)), 1 - cosine)
    return cosine, deviation


def split_deviation(
    reference: Float64[Tensor, "*rows d"], other: Float64[Tensor, "*rows d"]
) -> tuple[Float64[Tensor, "*rows"], Float64[Tensor, "*rows"]]:
    """Split `other - reference` along and across `reference` (H2).

    Returns:
        (α, ρ): α = ⟨Δ,v⟩/‖v‖² and ρ = ‖Δ - αv‖/‖v‖, dimensionless; NaN where `reference` is zero.
    """
    delta = other - reference
    squared = (reference * reference).sum(-1)
    alpha = (delta * reference).sum(-1) / squared
    across = delta - alpha.unsqueeze(-1) * reference
    rho = torch.sqrt((across * across).sum(-1) / squared)
    return alpha, rho


def hidden_stats(
    dense: Float64[Tensor, "rows d"], compressed: Float64[Tensor, "rows d"]
) -> dict[str, Float64[Tensor, " rows"]]:
    """Row statistics of the embedding space: `hidden_cosine` (H1), `hidden_alpha`, `hidden_rho` (H2)."""
    alpha, rho = split_deviation(dense, compressed)
    cosine, _ = cosine_from_split(alpha, rho**2)
    return {"hidden_cosine": cosine, "hidden_alpha": alpha, "hidden_rho": rho}
