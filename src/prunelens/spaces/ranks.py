"""How far two scores agree on an order."""

import numpy as np
from jaxtyping import Float


def rank_correlation(left: Float[np.ndarray, " n"], right: Float[np.ndarray, " n"]) -> float | None:
    """Spearman's ρ, ties sharing their mean rank; None where it is undefined (fewer than 3, or all equal).

    Args:
        left: (n,) scores.
        right: (n,) scores of the same things.
    """
    if len(left) < 3:
        return None
    x, y = (_ranks(values) - (len(values) + 1) / 2 for values in (left, right))
    size = float(np.sqrt(np.sum(x * x) * np.sum(y * y)))
    return float(np.sum(x * y)) / size if size > 0 else None


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
