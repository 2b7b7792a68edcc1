"""Curves over the steps of a text: deviation in the three spaces, survival, amplification against accumulation."""

from typing import Any

import numpy as np
import pyarrow as pa

from prunelens.report.figures import (
    INK,
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
from prunelens.study.summary import by_prompt, rows_of

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
        "margin": {"l": 64, "r": 14, "t": 84, "b": 48},  # room for the longest legend: panels stay level
    }
    return Panel(title, draw(traces, layout), height=380)


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
