"""What the dense model wrote, which comparisons of one model share."""

from dataclasses import dataclass

from prunelens.pruning.redundancy import Ranking
from prunelens.tracing.generate import Continuation


@dataclass(frozen=True)
class DenseTexts:
    """What the dense model wrote, greedily and sampled, and how its sublayers rank; the same for every comparison."""

    greedy: list[Continuation]
    sampled: list[Continuation]
    ranking: Ranking | None = None
