"""What a step asks for as plain values, which the files that compute take; no torch."""

from dataclasses import dataclass
from typing import Literal

Format = Literal["int8", "int4"]
Fit = Literal["bias", "linear", "folded"]


@dataclass(frozen=True)
class Pattern:
    """Which share of a weight becomes zero: `ratio` of it anywhere, or `zeros` among each `group` inputs in a row."""

    ratio: float
    zeros: int = 0
    group: int = 0


@dataclass(frozen=True)
class RepairForm:
    """What stands in for a part: a map of at most so many ranks; `weighted` counts tokens as they matter (R4)."""

    fit: Fit
    rank: int | None = None
    weighted: bool = False
