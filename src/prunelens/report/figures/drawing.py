"""What all figures share: a colour per model, axes, text that plotly cannot misread, and the drawing's JSON."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunelens.report.wording import shorten

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A6FD1")
"""One per compressed model, told apart also by the colour-blind (after Okabe and Ito)."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon")
DASHES = ("solid", "dot", "longdash", "dashdot")

INK, MUTED, GRID, PAPER = "#010203", "#010204", "#010205", "#010206"
"""Stand for the theme's colours; the page's script puts these in."""
HEAT = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
"""Stand for the theme's colours of heat maps, from the smallest to the largest value."""
HALO = "#010218"
"""Stands for the theme's glow around words that lie over curves."""
ZERO = "#010217"
"""Stands for the theme's colour of a cell that is exactly 0."""


@dataclass(frozen=True)
class Panel:
    """One drawing: plotly's JSON, or why there is nothing to draw."""

    title: str
    spec: str = ""
    empty: str = ""
    height: int = 320


@dataclass(frozen=True)
class Key:
    """One entry of a legend that several panels share; a colour scale has ends and ticks (place in percent, value)."""

    mark: str
    colour: str
    name: str
    ends: tuple[str, str] = ("", "")
    ticks: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Figure:
    """Drawings that belong together, with one sentence on how to read them and notes on what is left out.

    `across` panels stand side by side where there is room; `says` is what the numbers say, in sentences.
    """

    title: str
    how: str
    panels: tuple[Panel, ...]
    notes: tuple[str, ...] = ()
    model: int | None = None
    keys: tuple[Key, ...] = ()
    across: int = 1
    says: tuple[str, ...] = ()


@dataclass(frozen=True)
class Look:
    """How a compressed model is drawn in every figure."""

    name: str
    colour: str
    dash: str
    symbol: str

    def faded(self, alpha: float) -> str:
        """The colour, see-through."""
        red, green, blue = (int(self.colour[low : low + 2], 16) for low in (1, 3, 5))
        return f"rgba({red},{green},{blue},{alpha})"


def look(index: int, label: str) -> Look:
    """The look of the compressed model with this place in the run."""
    turn, place = divmod(index, len(COLOURS))
    return Look(plot_text(label), COLOURS[place], DASHES[turn % len(DASHES)], SYMBOLS[place])


def plot_text(text: str, limit: int = 48) -> str:
    """A foreign string for plotly, which reads tags and entities in titles, legends and hover texts."""
    return html.escape(shorten(text, limit), quote=False)


def draw(traces: Sequence[dict[str, Any]], layout: dict[str, Any]) -> str:
    """Plotly's JSON of a drawing, checked by plotly."""
    import plotly.graph_objects as go

    figure = go.Figure(data=list(traces), layout=_base_layout() | layout)
    found: str = figure.to_json(engine="json")
    return found


def _base_layout() -> dict[str, Any]:
    return {
        "template": {},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK, "size": 13, "family": "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"},
        "margin": {"l": 64, "r": 14, "t": 8, "b": 48},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "font": {"size": 12}},
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": GRID, "font": {"color": INK}},
        "hovermode": "closest",
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis in the theme's colours."""
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 13}},
        "gridcolor": GRID,
        "linecolor": MUTED,
        "tickfont": {"color": MUTED, "size": 12},
        "ticks": "outside",
        "tickcolor": GRID,
        "zeroline": False,
        "automargin": True,
        **more,
    }


def step_range(last: int) -> dict[str, Any]:
    """Range of an axis of steps from 1 to `last`."""
    margin = max(0.5, last * 0.02)
    whole = {"dtick": 1} if last <= 12 else {}
    return {"range": [1 - margin, last + margin], **whole}


def log_axis(title: str, low: float, high: float, **more: Any) -> dict[str, Any]:
    """A logarithmic axis from `low` to `high`, a little wider, with ticks that fit a narrow panel."""
    start, stop = math.log10(low) - 0.06, math.log10(high) + 0.06
    if stop - start < 1:
        middle = (start + stop) / 2
        start, stop = middle - 0.5, middle + 0.5
    span = stop - start
    if span <= 2.5:
        ticks: dict[str, Any] = _plain_ticks(start, stop)
    else:
        # plotly writes powers a quarter larger than it is told
        smaller = {"color": MUTED, "size": 12 / 1.25}
        ticks = {"dtick": math.ceil(span / 5), "exponentformat": "power", "tickfont": smaller}
    return axis(
        title,
        type="log",
        range=[start, stop],
        **ticks,
        **more,
    )


def _plain_ticks(start: float, stop: float) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times the powers of ten of a short logarithmic axis, written out."""
    steps = (1, 2, 5) if stop - start <= 1.5 else (1, 3)
    powers = range(math.floor(start), math.ceil(stop) + 1)
    values = [step * 10.0**power for power in powers for step in steps]
    return {"tickvals": values, "ticktext": [f"{value:g}" for value in values]}


def positive(*groups: np.ndarray) -> np.ndarray:
    """All values above zero."""
    values = np.concatenate([np.ravel(group) for group in groups]) if groups else np.zeros(0)
    return values[np.isfinite(values) & (values > 0)]


def band(x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, name: str, **more: Any) -> dict[str, Any]:
    """A filled band between two curves."""
    return {
        "type": "scatter",
        "x": np.concatenate([x, x[::-1]]),
        "y": np.concatenate([high, low[::-1]]),
        "fill": "toself",
        "fillcolor": colour,
        "line": {"width": 0},
        "mode": "lines",
        "hoverinfo": "skip",
        "name": name,
        **more,
    }


def line(x: np.ndarray, y: np.ndarray, name: str, colour: str, **more: Any) -> dict[str, Any]:
    """A curve; single points are marked so that they can be seen."""
    return {
        "type": "scatter",
        "x": x,
        "y": y,
        "name": name,
        "mode": "lines" if len(x) > 1 else "lines+markers",
        "line": {"color": colour, "width": 2, **more.pop("line", {})},
        **more,
    }
