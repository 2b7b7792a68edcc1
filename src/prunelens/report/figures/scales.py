"""Colour scales of heat maps: their ends, and the bar with values that stands above the figure."""

import math
from dataclasses import dataclass

import numpy as np

from prunelens.report.figures.drawing import Key, positive
from prunelens.report.wording import number, power_of_ten

MAX_DECADES = 6
LOWEST_SHARE = 0.02
"""Share of the values above 0 that may take the first colour, lest a few tiny ones leave the others one colour."""
FAR = 3.0
"""How many times smaller than the others the smallest value is where that is done."""
EDGE = 0.04
"""Ticks nearer than this share of the bar to one of its ends are left out: the ends have their values."""


@dataclass(frozen=True)
class Scale:
    """A logarithmic colour scale; with `clipped`, smaller values than `low` take its first colour."""

    low: float
    high: float
    clipped: bool = False

    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Powers of ten between the ends: where they stand, in percent of the bar, and what they are called."""
        start, stop = math.log10(self.low), math.log10(self.high)
        powers = range(math.ceil(start), math.floor(stop) + 1, math.ceil((stop - start) / 5))
        places = [((power - start) / (stop - start), power) for power in powers]
        return tuple((round(100 * at, 1), power_of_ten(power)) for at, power in places if EDGE < at < 1 - EDGE)


def scale_of(*grids: np.ndarray) -> Scale | None:
    """The scale that shows these values; None where none is above 0."""
    values = positive(*grids)
    if not len(values):
        return None
    smallest, high = float(values.min()), float(values.max())
    usual = float(np.quantile(values, LOWEST_SHARE, method="lower"))
    low = max(usual if smallest < usual / FAR else smallest, high / 10**MAX_DECADES)
    return Scale(low, high, smallest < low) if low < high else Scale(high / 10, high)


def scale_key(name: str, scale: Scale | None) -> Key:
    """The bar of a scale, with its ends and ticks."""
    if scale is None:
        return Key("none", "inherit", f"{name}: every value is exactly 0")
    low = f"{'≤ ' if scale.clipped else ''}{number(scale.low, 2)}"
    return Key("scale", "inherit", name, (low, number(scale.high, 2)), scale.ticks())
