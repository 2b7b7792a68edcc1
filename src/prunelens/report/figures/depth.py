"""How the difference grows with depth (L2): deviation of the residual stream after every sublayer."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from prunelens.report.figures.curves import QUANTILES, SPACE_NOISE
from prunelens.report.figures.drawing import (
    INK,
    MUTED,
    Figure,
    Key,
    Look,
    Panel,
    band,
    draw,
    line,
    log_axis,
    look,
    positive,
)
from prunelens.report.figures.layers import (
    COSINES,
    Place,
    Traced,
    absent,
    block_axis,
    changed_places,
    kind_name,
    lens_of,
    num_blocks,
    offsets,
    parallel_note,
    place_name,
    sample,
    traced,
)
from prunelens.report.figures.noise import floor_lines, floor_note
from prunelens.study.store import Run

TITLES = {"hidden_cosine": "h: the state for the head", "logit_cosine": "z: logits", "prob_cosine": "p: probabilities"}
SHORT = {"hidden_cosine": "h", "logit_cosine": "z", "prob_cosine": "p"}
MAX_MARKED = 0.5
"""Largest share of changed sublayers at which each of them is marked."""


@dataclass(frozen=True)
class _Curve:
    """Quantiles over prompts and steps of one deviation after every sublayer; `start` are the leading zeros."""

    title: str
    name: str
    lens: str
    places: list[Place]
    quantiles: np.ndarray
    largest: np.ndarray
    samples: int

    @property
    def start(self) -> int:
        """How many sublayers from the first on have nothing but zeros."""
        moved = np.nonzero(self.largest != 0)[0]
        return int(moved[0]) if len(moved) else len(self.places)


def depth_figure(run: Run, index: int) -> Figure:
    """1 - cosine after every sublayer, in quantiles over prompts and steps, of one compressed model."""
    label = run.info["compressed"][index]["label"]
    title = "How the difference grows with depth, both models reading the same text"
    curves = _curves(run, label)
    if not curves:
        return Figure(title, "", (Panel("", empty=absent(run, index)),), (), index)
    style, changed, blocks = look(index, label), changed_places(run, index), num_blocks(run)
    yaxis = log_axis("1 − cosine (no unit)", *_limits(curves))
    panels = [_panel(run, curve, yaxis, style, changed, blocks) for curve in curves]
    read = {SHORT[curve.name]: SPACE_NOISE[curve.name] for curve in curves if curve.lens == "normed"}
    return Figure(
        title,
        "After each sublayer the two residual streams are compared: the line is the median over prompts and steps, "
        "and a jump stands where a sublayer adds a difference that later ones pass on or damp.",
        tuple(panels),
        (
            _samples(run, curves),
            _before(curves[0], changed),
            _below(curves, 10 ** yaxis["range"][0]),
            floor_note(run.info, read, yaxis).replace("percentile,", "percentile at the end of the network,", 1),
            parallel_note(run, "cumulative"),
        ),
        index,
        _keys(style, changed, curves[0]),
        across=2,
    )


def _keys(style: Look, changed: set[Place], curve: _Curve) -> tuple[Key, ...]:
    marks = _marked(changed, curve.places)
    return (
        Key("line", style.colour, "median"),
        Key("band", style.faded(0.42), "25 to 75 %"),
        Key("band", style.faded(0.16), "5 to 95 %"),
        *([Key("triangle", "var(--ink)", "changed sublayer")] if marks else []),
    )


def _curves(run: Run, label: str) -> list[_Curve]:
    """The raw stream at every step, then h, z and p through the lens at the sampled steps."""
    raw = traced(run, label, "cumulative", "raw")
    found = [_curve(raw, "hidden_cosine", "raw", "Residual stream, before the final norm")]
    if lens_of(run) == "normed":
        normed = traced(run, label, "cumulative", "normed")
        found += [_curve(normed, name, "normed", TITLES[name]) for name in COSINES]
    else:
        found += [_curve(raw, name, "raw", f"{TITLES[name]}, without the final norm") for name in COSINES[1:]]
    return [curve for curve in found if curve is not None]


def _curve(rows: Traced, name: str, lens: str, title: str) -> _Curve | None:
    values = rows.deviation(name)
    kept = np.isfinite(values)
    places = rows.places()
    if not kept.any():
        return None
    groups = [values[kept & (rows.block == block) & (rows.kind == kind)] for block, kind in places]
    filled = [(place, group) for place, group in zip(places, groups, strict=True) if len(group)]
    quantiles = np.array([np.quantile(group, QUANTILES) for _, group in filled]).T
    largest = np.array([group[np.argmax(np.abs(group))] for _, group in filled])
    return _Curve(title, name, lens, [place for place, _ in filled], quantiles, largest, len(filled[-1][1]))


def _limits(curves: list[_Curve]) -> tuple[float, float]:
    """Ends of the common axis; the lowest of the bands may reach below it."""
    groups = [values for curve in curves if len(values := positive(curve.quantiles[1:4]))]
    if not groups:
        return 1e-9, 1.0
    low = min(float(np.quantile(values, 0.02)) for values in groups)
    return low, max(float(positive(curve.quantiles).max()) for curve in curves if len(positive(curve.quantiles)))


def _panel(run: Run, curve: _Curve, yaxis: dict[str, Any], style: Look, changed: set[Place], blocks: int) -> Panel:
    if curve.start == len(curve.places):
        return Panel(curve.title, empty="Every value is exactly 0: both models agree.")
    x = _positions(curve.places)
    shown = slice(curve.start, None)
    floor = 10 ** yaxis["range"][0] / 2
    p05, p25, _, p75, p95 = np.maximum(curve.quantiles[:, shown], floor)
    traces = [
        band(x[shown], p05, p95, style.faded(0.16), "5–95 %"),
        band(x[shown], p25, p75, style.faded(0.32), "25–75 %"),
        _median(curve, x, style),
        _changed_marks(curve, x, changed, yaxis),
    ]
    if curve.lens == "normed":
        ends = (-0.5, blocks - 0.3)
        words_left = 2 * curve.start > len(curve.places)  # where nothing is drawn
        floors = floor_lines(run.info, SPACE_NOISE[curve.name], ends[::-1] if words_left else ends, yaxis)
        traces += [trace | {"textposition": "top right"} if words_left else trace for trace in floors]
    layout = {
        "xaxis": block_axis(blocks, f"block{_order(curve)}"),
        "yaxis": yaxis,
        "hovermode": "x",
        "showlegend": False,
        **_before_marks(curve, x),
    }
    return Panel(curve.title, draw(traces, layout), height=320)


def _positions(places: list[Place]) -> np.ndarray:
    places_of = offsets(sorted({kind for _, kind in places}))
    return np.array([block + places_of[kind] for block, kind in places])


def _order(curve: _Curve) -> str:
    kinds = sorted({kind for _, kind in curve.places})
    return f" ({kind_name(kinds[0])} at the mark, {kind_name(kinds[1])} half-way on)" if len(kinds) == 2 else ""


def _median(curve: _Curve, x: np.ndarray, style: Look) -> dict[str, Any]:
    values = curve.quantiles[2, curve.start :]
    return line(
        x[curve.start :],
        np.where(values > 0, values, np.nan),
        "median",
        style.colour,
        mode="lines+markers",
        marker={"size": 4, "color": style.colour},
        text=[place_name(place) for place in curve.places[curve.start :]],
        hovertemplate="after the %{text}<br>median %{y:.3g}<extra></extra>",
    )


def _marked(changed: set[Place], places: list[Place]) -> list[int]:
    """Places that are marked as changed: all of them, or the first alone where they are many."""
    found = [order for order, place in enumerate(places) if place in changed]
    return found if len(found) <= MAX_MARKED * len(places) else found[:1]


def _changed_marks(curve: _Curve, x: np.ndarray, changed: set[Place], yaxis: dict[str, Any]) -> dict[str, Any]:
    """Small triangles on the axis below the changed sublayers."""
    marks = _marked(changed, curve.places)
    low, high = yaxis["range"]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x[marks],
        "y": np.full(len(marks), 10 ** (low + 0.025 * (high - low))),
        "text": [place_name(curve.places[order]) for order in marks],
        "marker": {"symbol": "triangle-up", "size": 9, "color": INK},
        "hoverinfo": "skip",
        "name": "changed sublayer",
    }


def _before_marks(curve: _Curve, x: np.ndarray) -> dict[str, Any]:
    """A line where the first difference stands, and a word on the part before it."""
    if not curve.start:
        return {}
    first = float(x[curve.start])
    shapes = [
        {
            "type": "line",
            "x0": first,
            "x1": first,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": MUTED, "width": 1.2, "dash": "dot"},
        }
    ]
    wide = first > 0.15 * x[-1]
    word = {
        "text": "exactly 0",
        "x": (first - 0.5) / 2,
        "yref": "paper",
        "y": 0.5,
        "showarrow": False,
        "font": {"color": MUTED, "size": 12},
    }
    return {"shapes": shapes, "annotations": [word] if wide else []}


def _before(curve: _Curve, changed: set[Place]) -> str:
    if not curve.start or curve.start == len(curve.places):
        return ""
    first = curve.places[curve.start]
    what = ", the first sublayer that is changed" if changed and first == min(changed) else ""
    return f"Before the {place_name(first)}{what}, every value is exactly 0 and nothing is drawn."


def _samples(run: Run, curves: list[_Curve]) -> str:
    raw = [curve for curve in curves if curve.lens == "raw" and curve.name == "hidden_cosine"]
    whole = f"Residual stream: every step of the greedy texts, {raw[0].samples:,} in all" if raw else ""
    how = "through the final norm and the head" if lens_of(run) == "normed" else "through the head alone"
    rest = f"h, z and p read {how} at {sample(run)}" if len(curves) > 1 else ""
    return "; ".join(part for part in (whole, rest) if part) + "."


def _below(curves: list[_Curve], low: float) -> str:
    """How many of the drawn quantiles the axis does not show."""
    drawn = [curve.quantiles[:, curve.start :] for curve in curves]
    below = sum(int(np.sum(values < low)) for values in drawn)
    total = sum(values.size for values in drawn)
    return f"{below:,} of {total:,} quantiles lie below the axis." if below else ""
