"""Survival of whole generations, and its check by free running."""

from typing import Any

import numpy as np
import pyarrow as pa

from prunelens.report.figures.drawing import INK, MUTED, Figure, Look, Panel, axis, band, draw, line, look, step_range
from prunelens.study.rows import column, rows_of
from prunelens.study.store import Run

NUM_MARKS = 24
MAX_BANDS = 4
"""Largest number of models whose bands can be told apart in one drawing."""


def survival_overview(run: Run) -> Figure:
    """S(n) of all compressed models in one drawing."""
    traces: list[dict[str, Any]] = []
    labels = [record["label"] for record in run.info["compressed"]]
    horizon = 1
    for index, label in enumerate(labels):
        rows, style = rows_of(run.tables["survival"], compressed=label), look(index, label)
        n = column(rows, "n")
        horizon = max(horizon, len(n))
        if len(labels) <= MAX_BANDS:
            traces.append(_survival_band(rows, n, style, showlegend=False, legendgroup=str(index)))
        own = line(
            n,
            column(rows, "survival_sampled"),
            style.name,
            style.colour,
            legendgroup=str(index),
            hovertemplate="%{y:.3f}",
        )
        own["line"]["dash"] = style.dash
        traces.append(own)
    traces += anchor_curves(run)
    traces.append(_half(horizon))
    bands = (
        "the band is the 95 % interval over prompts, and where bands overlap this run does not tell the models apart"
        if len(labels) <= MAX_BANDS
        else "the figure below has the interval of each model"
    )
    return Figure(
        "How long sampled texts stay the same, all models",
        f"At n tokens the curve is the probability that both models have written the same n tokens; {bands}.",
        (Panel("", draw(traces, _survival_layout(horizon)), height=380),),
    )


def anchor_curves(run: Run) -> list[dict[str, Any]]:
    """S(n) of the dense model with rounded weights (A2), grey, one dash each."""
    found = []
    for anchor, dash in zip(run.info.get("anchors", []), ("dot", "dash"), strict=False):
        if not anchor.get("reason"):
            n = np.arange(1, len(anchor["curve"]) + 1)
            curve = line(n, np.array(anchor["curve"]), f"dense in {anchor['anchor']}", MUTED, hovertemplate="%{y:.3f}")
            curve["line"]["dash"] = dash
            found.append(curve)
    return found


def survival_figure(run: Run, index: int) -> Figure:
    """S(n) of one compressed model with its bound (S2') and what was measured by running (S3, S3')."""
    label = run.info["compressed"][index]["label"]
    rows, style = rows_of(run.tables["survival"], compressed=label), look(index, label)
    n = column(rows, "n")
    sampled = line(n, column(rows, "survival_sampled"), "S(n), predicted", style.colour, hovertemplate="%{y:.3f}")
    bound = line(
        n,
        column(rows, "survival_bound"),
        "bound 1 − TVₙ",
        style.colour,
        hovertemplate="%{y:.3f}",
        line={"dash": "dash", "width": 1.6},
    )
    free = line(
        n,
        column(rows, "survival_free"),
        "greedy, run freely",
        INK,
        mode="lines",
        hovertemplate="%{y:.3f}",
        line={"width": 1.4},
    )
    traces = [
        _survival_band(rows, n, style),
        sampled,
        bound,
        free,
        _marks(n, column(rows, "survival_greedy"), "greedy, predicted S3", "x-thin", INK),
        _marks(n, column(rows, "survival_coupled"), "coupling, simulated S3′", "circle-open", style.colour),
        *anchor_curves(run),
        _half(len(n)),
    ]
    return Figure(
        "Forecast of one model against what running it showed",
        "The circles should scatter around the solid coloured curve and stay below the dashed one, which no "
        "coupling can exceed; the crosses should sit on the thin line.",
        (Panel("", draw(traces, _survival_layout(len(n))), height=420),),
        (
            "The bound and S(n) are estimated from the same sampled texts, so with few prompts noise may make them "
            "cross; the measured curves are shares of prompts and move in steps. Texts are written from the forecast "
            "divergence on, so the thin line may lie above the crosses, where rounding decides a tie, but not below.",
        ),
        index,
    )


def _survival_band(rows: pa.Table, n: np.ndarray, style: Look, **more: Any) -> dict[str, Any]:
    low, high = column(rows, "survival_sampled_low"), column(rows, "survival_sampled_high")
    return band(n, low, high, style.faded(0.18), "95 % interval of S(n)", **more)


def _marks(n: np.ndarray, values: np.ndarray, name: str, symbol: str, colour: str) -> dict[str, Any]:
    """Markers at evenly spread n."""
    chosen = np.unique(np.linspace(0, len(n) - 1, min(len(n), NUM_MARKS)).round().astype(int))
    return {
        "type": "scatter",
        "mode": "markers",
        "x": n[chosen],
        "y": values[chosen],
        "name": name,
        "marker": {"symbol": symbol, "size": 8, "color": colour, "line": {"color": colour, "width": 1.6}},
        "hovertemplate": "%{y:.3f}",
    }


def _half(horizon: int) -> dict[str, Any]:
    ends = np.array([0.0, horizon + 1.0])
    dotted = {"dash": "dot", "width": 1.2}
    return line(ends, np.array([0.5, 0.5]), "½", MUTED, mode="lines", line=dotted, hoverinfo="skip")


def _survival_layout(horizon: int) -> dict[str, Any]:
    return {
        "xaxis": axis("n, tokens", **step_range(horizon)),
        "yaxis": axis("probability, or share of prompts", range=[-0.03, 1.04], dtick=0.25),
        "hovermode": "x unified",
    }
