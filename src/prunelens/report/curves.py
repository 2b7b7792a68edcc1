"""Curves over the steps of a text: deviation in the three spaces, survival, amplification against accumulation."""

from typing import Any

import numpy as np
import pyarrow as pa

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
    log_axis,
    look,
    positive,
)
from prunelens.study.store import Run
from prunelens.study.summary import by_prompt, column, rows_of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SPACES = (
    ("Embedding space, h", "hidden_cosine"),
    ("Logit space, z", "logit_cosine"),
    ("Probability space, p", "prob_cosine"),
)
NUM_MARKS = 24
STEP = "step, tokens"


def step_matrix(rows: pa.Table, name: str) -> np.ndarray:
    """(prompts, steps) of a column, NaN where a text has ended."""
    series = [values for _, values in by_prompt(rows, name)]
    return stacked(series)


def stacked(series: list[np.ndarray]) -> np.ndarray:
    """Rows of different length as one matrix, NaN behind their ends."""
    matrix = np.full((len(series), max(map(len, series), default=0)), np.nan)
    for row, values in zip(matrix, series, strict=True):
        row[: len(values)] = values
    return matrix


def deviation_figure(run: Run, index: int) -> Figure:
    """1 - cosine in the three spaces over the steps of the greedy texts, quantiles over prompts (H1, Z1, Z2, P1)."""
    label = run.info["compressed"][index]["label"]
    rows = rows_of(run.tables["steps"], compressed=label, trace="greedy")
    names = [*(name for _, name in SPACES), "logit_cosine_centered"]
    found = {name: 1 - step_matrix(rows, name) for name in names}
    shown = positive(*found.values())
    limits = (float(shown.min()), float(shown.max())) if len(shown) else (1e-9, 1.0)
    style = look(index, label)
    panels = [
        _deviation_panel(
            title, found[name], found["logit_cosine_centered"] if name == "logit_cosine" else None, limits, style
        )
        for title, name in SPACES
    ]
    lengths = np.isfinite(found["prob_cosine"]).sum(axis=0)
    return Figure(
        "Deviation in the three spaces, both models reading the same text",
        "The line is the median over prompts and the bands hold half and nine tenths of them; the three panels "
        "share one axis, so a higher curve is a larger turn away from the dense model.",
        tuple(panels),
        (_left_out(found), _prompts_left(lengths)),
        index,
    )


def _deviation_panel(
    title: str, values: np.ndarray, centered: np.ndarray | None, limits: tuple[float, float], style: Look
) -> Panel:
    if not np.isfinite(values).any():
        return Panel(title, empty="Not measured.")
    if not len(positive(values)):
        return Panel(title, empty="Every value is exactly 0: both models agree.")
    steps, (p05, p25, p50, p75, p95) = _quantiles(values)
    floor = limits[0] / 2
    traces = [
        band(steps, _floored(p05, floor), _floored(p95, floor), style.faded(0.16), "5–95 %"),
        band(steps, _floored(p25, floor), _floored(p75, floor), style.faded(0.32), "25–75 %"),
        _median(steps, p50, "median", style.colour),
    ]
    if centered is not None:
        traces.append(_median(*_median_of(centered), "median, centred z", INK, line={"dash": "dash"}))
    layout = {
        "xaxis": axis(STEP, **_step_range(steps)),
        "yaxis": log_axis("1 − cosine (no unit)", *limits),
        "hovermode": "x unified",
    }
    return Panel(title, draw(traces, layout), height=330)


def _median(steps: np.ndarray, values: np.ndarray, name: str, colour: str, **more: Any) -> dict[str, Any]:
    return line(steps, np.where(values > 0, values, np.nan), name, colour, hovertemplate="%{y:.3g}", **more)


def _quantiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and (5, steps) quantiles over prompts, where there is a prompt."""
    kept = np.isfinite(values).any(axis=0)
    return np.nonzero(kept)[0] + 1, np.nanquantile(values[:, kept], QUANTILES, axis=0)


def _median_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    steps, quantiles = _quantiles(values)
    return steps, quantiles[2]


def _floored(values: np.ndarray, floor: float) -> np.ndarray:
    return np.maximum(values, floor)


def _step_range(steps: np.ndarray) -> dict[str, Any]:
    last = int(steps[-1]) if len(steps) else 1
    margin = max(0.5, last * 0.02)
    whole = {"dtick": 1} if last <= 12 else {}
    return {"range": [1 - margin, last + margin], **whole}


def _left_out(found: dict[str, np.ndarray]) -> str:
    zero = [int(np.sum(values <= 0)) for values in found.values()]
    total = sum(int(np.isfinite(values).sum()) for values in found.values())
    if not sum(zero):
        return f"All {total:,} values are above 0."
    named = zip(("h", "z", "p", "centred z"), zero, strict=True)
    where = ", ".join(f"{number:,} in {name}" for name, number in named if number)
    return (
        f"{sum(zero):,} of {total:,} values are 0 or below rounding and cannot stand on a logarithmic axis "
        f"({where}); they count in the quantiles and lie below the axis."
    )


def _prompts_left(lengths: np.ndarray) -> str:
    if not len(lengths):
        return ""
    return f"Texts end at different steps: {lengths[0]} prompts at step 1, {lengths[-1]} at step {len(lengths)}."


def survival_overview(run: Run) -> Figure:
    """S(n) of all compressed models in one drawing."""
    traces: list[dict[str, Any]] = []
    labels = [record["label"] for record in run.info["compressed"]]
    horizon = 1
    for index, label in enumerate(labels):
        rows, style = rows_of(run.tables["survival"], compressed=label), look(index, label)
        n = column(rows, "n")
        horizon = max(horizon, len(n))
        if len(labels) <= 4:
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
    bands = "; the band is the 95 % interval over prompts" if len(labels) <= 4 else ""
    return Figure(
        "How long sampled texts stay the same, all models",
        f"At n tokens the curve is the probability that both models have written the same n tokens{bands}; where "
        "bands overlap, this run does not tell the models apart.",
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
            "The bound and S(n) are estimated from the same sampled texts; the measured curves are shares of prompts and move in steps.",
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
        "xaxis": axis("n, tokens", **_step_range(np.array([horizon]))),
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
            "Once contexts differ the free-running KL compares different contexts: it says how far apart the models are, not how wrong a step is.",
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
        "xaxis": axis(STEP, anchor="y2", **_step_range(steps)),
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
