"""Deviation in the embedding, logit and probability space over the steps of a text, in quantiles over prompts."""

from typing import Any

import numpy as np
import pyarrow as pa

from prunelens.report.figures.drawing import (
    INK,
    Figure,
    Key,
    Look,
    Panel,
    axis,
    band,
    draw,
    line,
    log_axis,
    look,
    positive,
    step_range,
)
from prunelens.report.figures.noise import floor_lines, floor_note
from prunelens.study.rows import by_prompt, rows_of
from prunelens.study.store import Run

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SPACES = (
    ("Embedding space, h", "hidden_cosine"),
    ("Logit space, z", "logit_cosine"),
    ("Probability space, p", "prob_cosine"),
)
SPACE_NOISE = {
    "hidden_cosine": "hidden_deviation",
    "logit_cosine": "logit_deviation",
    "prob_cosine": "prob_deviation",
}
"""What the noise floor calls 1 - cosine of each space."""
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
    names = [*(name for _, name in SPACES), "logit_cosine_centered"]
    rows = rows_of(run.tables["steps"], ("prompt_id", *names), compressed=label, trace="greedy")
    found = {name: 1 - step_matrix(rows, name) for name in names}
    limits, style = _limits(found), look(index, label)
    yaxis = log_axis("1 − cosine (no unit)", *limits)
    centered = {"logit_cosine": found["logit_cosine_centered"]}
    panels = [
        _deviation_panel(run, (title, name), found[name], centered.get(name), yaxis, style) for title, name in SPACES
    ]
    lengths = np.isfinite(found["prob_cosine"]).sum(axis=0)
    return Figure(
        "Deviation in the three spaces, both models reading the same text",
        "The line is the median over prompts and the bands hold half and nine tenths of them; the three panels "
        "share one axis, so a higher curve is a larger turn away from the dense model.",
        tuple(panels),
        (
            _below(found, limits[0]),
            floor_note(
                run.info, {short: SPACE_NOISE[name] for short, (_, name) in zip("hzp", SPACES, strict=True)}, yaxis
            ),
            _prompts_left(lengths),
        ),
        index,
        _keys(style),
        across=3,
    )


def _keys(style: Look) -> tuple[Key, ...]:
    return (
        Key("line", style.colour, "median"),
        Key("band", style.faded(0.42), "25 to 75 %"),
        Key("band", style.faded(0.16), "5 to 95 %"),
        Key("dash", "var(--ink)", "median of the centred z (softmax ignores a common shift)"),
    )


def _limits(found: dict[str, np.ndarray]) -> tuple[float, float]:
    """Ends of the common axis; the few smallest values of each space may lie below it."""
    groups = [values for values in map(positive, found.values()) if len(values)]
    if not groups:
        return 1e-9, 1.0
    return min(float(np.quantile(values, 0.05)) for values in groups), max(float(values.max()) for values in groups)


def _deviation_panel(
    run: Run,
    space: tuple[str, str],
    values: np.ndarray,
    centered: np.ndarray | None,
    yaxis: dict[str, Any],
    style: Look,
) -> Panel:
    title, name = space
    if not len(positive(values)):
        measured = np.isfinite(values).any()
        return Panel(title, empty="Every value is exactly 0: both models agree." if measured else "Not measured.")
    steps, (p05, p25, p50, p75, p95) = _quantiles(values)
    floor = 10 ** yaxis["range"][0] / 2  # below the axis
    traces = [
        band(steps, _floored(p05, floor), _floored(p95, floor), style.faded(0.16), "5–95 %"),
        band(steps, _floored(p25, floor), _floored(p75, floor), style.faded(0.32), "25–75 %"),
        _median(steps, p50, "median", style.colour),
    ]
    if centered is not None:
        traces.append(_median(*_median_of(centered), "median, centred z", INK, line={"dash": "dash"}))
    steps_axis = axis(STEP, **step_range(int(steps[-1])))
    traces += floor_lines(run.info, SPACE_NOISE[name], steps_axis["range"], yaxis)
    layout = {
        "xaxis": steps_axis,
        "yaxis": yaxis,
        "hovermode": "x unified",
        "showlegend": False,
    }
    return Panel(title, draw(traces, layout), height=330)


def _median(steps: np.ndarray, values: np.ndarray, name: str, colour: str, **more: Any) -> dict[str, Any]:
    mode = "lines" if len(steps) > 12 else "lines+markers"
    return line(steps, np.where(values > 0, values, np.nan), name, colour, mode=mode, hovertemplate="%{y:.3g}", **more)


def _quantiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and (5, steps) quantiles over prompts, where there is a prompt."""
    kept = np.isfinite(values).any(axis=0)
    return np.nonzero(kept)[0] + 1, np.nanquantile(values[:, kept], QUANTILES, axis=0)


def _median_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    steps, quantiles = _quantiles(values)
    return steps, quantiles[2]


def _floored(values: np.ndarray, floor: float) -> np.ndarray:
    return np.maximum(values, floor)


def _below(found: dict[str, np.ndarray], start: float) -> str:
    """How many values the axis does not show, and how many of these are 0."""
    total = sum(int(np.isfinite(values).sum()) for values in found.values())
    below = sum(int(np.sum(values < start)) for values in found.values())
    named = zip(("h", "z", "p", "centred z"), found.values(), strict=True)
    zeros = ((name, int(np.sum(values <= 0))) for name, values in named)
    where = ", ".join(f"{number:,} in {name}" for name, number in zeros if number)
    exact = f" (0 or lost in rounding: {where})" if where else ""
    return f"{below:,} of {total:,} values lie below the axis{exact}; they count in the quantiles." if below else ""


def _prompts_left(lengths: np.ndarray) -> str:
    if not len(lengths):
        return ""
    return f"Texts end at different steps: prompts at step 1: {lengths[0]}, at step {len(lengths)}: {lengths[-1]}."
