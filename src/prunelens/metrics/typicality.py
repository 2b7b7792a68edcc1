"""Which texts cost more or less than nearly all texts of a reference: outside its central 95 %."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

OUTSIDE = 0.05
"""Share of the reference's own texts that lies outside."""


def atypical(
    costs: Float64[np.ndarray, " n"],
    owners: Sequence[str],
    reference: Float64[np.ndarray, " m"],
    reference_owners: Sequence[str],
) -> list[bool | None]:
    """For each text whether its cost lies outside the central 95 % of the reference's other texts (V9).

    A text is held against the reference without the texts of its own owner (its prompt), so that a text of the
    reference is judged as any other. Of m costs it must lie below the k-th smallest or above the k-th largest, with k
    the whole number nearest to 0.025 (m + 1), at least 1: a text of the same kind does so with probability 2k/(m + 1),
    whatever the distribution of costs. None where fewer than two costs are left.

    Args:
        costs: (n,) nats per token.
        owners: whose text each is.
        reference: (m,) costs of the reference's texts.
        reference_owners: whose text each of those is.
    """
    whose = np.array(reference_owners)
    bands = {owner: _band(np.sort(reference[whose != owner])) for owner in set(owners)}
    return [_is_outside(float(cost), bands[owner]) for cost, owner in zip(costs, owners, strict=True)]


def _band(others: Float64[np.ndarray, " m"]) -> tuple[float, float] | None:
    count = max(1, round(OUTSIDE / 2 * (len(others) + 1)))
    return (float(others[count - 1]), float(others[-count])) if len(others) > 1 else None


def _is_outside(cost: float, band: tuple[float, float] | None) -> bool | None:
    return None if band is None else not band[0] <= cost <= band[1]
