"""Figures of whole generations: survival, its check by free running, and amplification against accumulation."""

from typing import Any

import numpy as np
import pyarrow as pa

from prunelens.report.curves import STEP, stacked
from prunelens.report.figures import (
    GRID,
    INK,
    MUTED,
    Figure,
    Look,
    Panel,
    axis,
    band,
    draw,
    line,
    look,
    step_range,
)
from prunelens.report.wording import number
from prunelens.study.store import Run
from prunelens.study.summary import by_prompt, column, rows_of

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
        _half(len(n)),
    ]
    return Figure(
        "Forecast of one model against what running it showed",
        "The circles should scatter around the solid coloured curve and stay below the dashed one, which no "
        "coupling can exceed; the crosses should sit on the thin line.",
        (Panel("", draw(traces, _survival_layout(len(n))), height=420),),
        (
            "The bound and S(n) are estimated from the same sampled texts, so with few prompts noise may make them "
            "cross; the measured curves are shares of prompts and move in steps.",
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


def accumulation_figure(run: Run, index: int) -> Figure:
    """Mean KL per step read and written freely (S6), over the prompts whose both texts are that long."""
    label = run.info["compressed"][index]["label"]
    forced, free, differ = _paired(run.tables["steps"], label)
    if not forced.size:
        return Figure("Amplification against accumulation", "", (Panel("", empty="No free-running text."),), (), index)
    style, steps = look(index, label), np.arange(1, forced.shape[1] + 1)
    alone, together = np.nanmean(forced, axis=0), np.nanmean(free, axis=0)
    both = np.isfinite(free).sum(axis=0)
    same = np.nansum(differ == 0, axis=0)
    traces = [
        band(steps, alone, together, style.faded(0.25), "accumulation"),
        line(steps, together, "free-running", style.colour, hovertemplate="%{y:.3g} nats"),
        line(
            steps,
            alone,
            "teacher-forced (amplification alone)",
            INK,
            hovertemplate="%{y:.3g} nats",
            line={"dash": "dash"},
        ),
        line(
            steps, both, "texts compared", MUTED, yaxis="y2", hovertemplate="%{y}", line={"width": 1.4, "shape": "hv"}
        ),
        line(
            steps,
            same,
            "of them still the same context",
            style.colour,
            yaxis="y2",
            fill="tozeroy",
            fillcolor=style.faded(0.25),
            hovertemplate="%{y}",
            line={"width": 1.4, "shape": "hv"},
        ),
    ]
    return Figure(
        "Amplification against accumulation",
        "The dashed line is what one step does by itself; the shaded gap above it is what earlier differences add "
        "once the texts have parted, and the lower panel counts the prompts whose texts have not.",
        (Panel("", draw(traces, _accumulation_layout(steps, int(both.max()))), height=460),),
        (
            f"Mean over these steps: {number(float(np.nanmean(forced)))} nats read, "
            f"{number(float(np.nanmean(free)))} nats run freely, from the same prompts at the same steps.",
            "Once contexts differ the free-running KL compares different contexts: it says how far apart the models "
            "are, not how wrong a step is.",
        ),
        index,
    )


def _paired(steps: pa.Table, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL read, KL run freely and whether contexts differ, (prompts, steps), where both texts go on."""
    forced_rows = rows_of(steps, compressed=label, trace="greedy")
    free_rows = rows_of(steps, compressed=label, trace="free")
    forced = dict(by_prompt(forced_rows, "kl_dense_compressed"))
    free = {key: values for key, *values in by_prompt(free_rows, "kl_dense_compressed", "contexts_differ")}
    keys = [key for key in free if key in forced]
    return (
        stacked([forced[key][: len(free[key][0])] for key in keys]),
        stacked([free[key][0] for key in keys]),
        stacked([free[key][1] for key in keys]),
    )


def _accumulation_layout(steps: np.ndarray, prompts: int) -> dict[str, Any]:
    return {
        "xaxis": axis(STEP, anchor="y2", **step_range(len(steps))),
        "yaxis": axis("mean KL, nats", domain=[0.36, 1], rangemode="tozero"),
        "yaxis2": axis("prompts", domain=[0, 0.24], range=[0, prompts * 1.08], nticks=4),
        "hovermode": "x unified",
        "shapes": [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "yref": "paper",
                "y0": 0.3,
                "y1": 0.3,
                "line": {"color": GRID, "width": 1},
            }
        ],
    }
