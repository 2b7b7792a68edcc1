"""Amplification against accumulation (S6): the KL of one step, and what earlier differences add to it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from prunelens.metrics.intervals import ratio_interval
from prunelens.report.figures.curves import STEP, stacked
from prunelens.report.figures.drawing import (
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
from prunelens.report.figures.noise import floor_lines, floor_note
from prunelens.report.wording import interval, number
from prunelens.study.rows import by_prompt, rows_of
from prunelens.study.store import Run

KL = "kl_dense_compressed"
FIRST_RANGE = 8
"""Steps of the first two ranges of the table; each later range is twice as long as the one before."""


def accumulation_figure(run: Run, index: int) -> Figure:
    """Mean KL per step read and written freely (S6), over the prompts whose both texts are that long."""
    label = run.info["compressed"][index]["label"]
    title = "Amplification against accumulation"
    forced, free, differ = _paired(run.tables["steps"], label)
    if not forced.size:
        return Figure(title, "", (Panel("", empty="No free-running text."),), (), index)
    steps = np.arange(1, forced.shape[1] + 1)
    alone, together = np.nanmean(forced, axis=0), np.nanmean(free, axis=0)
    both, same = np.isfinite(free).sum(axis=0), np.nansum(differ == 0, axis=0)
    layout = _layout(steps, float(max(alone.max(), together.max())), int(both.max()))
    traces = [
        *_kl_traces(steps, alone, together, look(index, label)),
        *_prompt_traces(steps, both, same, look(index, label)),
        *floor_lines(run.info, KL, layout["xaxis"]["range"], layout["yaxis"]),
    ]
    return Figure(
        title,
        "The dashed line is what one step does by itself; the shaded gap above it is what earlier differences add "
        "once the texts have diverged, and the lower panel counts the prompts whose texts have not.",
        (Panel("", draw(traces, layout), height=460),),
        (
            f"Mean over these steps: {number(float(np.nanmean(forced)))} nats read, "
            f"{number(float(np.nanmean(free)))} nats run freely, from the same prompts at the same steps.",
            "Once contexts differ the free-running KL compares different contexts: it says how far apart the models "
            "are, not how wrong a step is.",
            floor_note(run.info, {"KL": KL}, layout["yaxis"], " nats"),
        ),
        index,
    )


def _kl_traces(steps: np.ndarray, alone: np.ndarray, together: np.ndarray, style: Look) -> list[dict[str, Any]]:
    shown = {"hovertemplate": "%{y:.3g} nats"}
    return [
        band(steps, alone, together, style.faded(0.25), "accumulation"),
        line(steps, together, "free-running", style.colour, **shown),
        line(steps, alone, "teacher-forced (amplification alone)", INK, line={"dash": "dash"}, **shown),
    ]


def _prompt_traces(steps: np.ndarray, both: np.ndarray, same: np.ndarray, style: Look) -> list[dict[str, Any]]:
    shown = {"yaxis": "y2", "hovertemplate": "%{y}"}
    stairs = {"width": 1.4, "shape": "hv"}
    filled = {"fill": "tozeroy", "fillcolor": style.faded(0.25)}
    return [
        line(steps, both, "texts compared", MUTED, line=stairs, **shown),
        line(steps, same, "of them still the same context", style.colour, line=stairs, **filled, **shown),
    ]


def _paired(steps: pa.Table, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL read, KL run freely and whether contexts differ, (prompts, steps), where both texts go on."""
    names = ("prompt_id", KL, "contexts_differ")
    forced_rows, free_rows = (rows_of(steps, names, compressed=label, trace=trace) for trace in ("greedy", "free"))
    forced = dict(by_prompt(forced_rows, KL))
    free = {key: values for key, *values in by_prompt(free_rows, KL, "contexts_differ")}
    keys = [key for key in free if key in forced]
    both = {key: min(len(forced[key]), len(free[key][0])) for key in keys}
    return (
        stacked([forced[key][: both[key]] for key in keys]),
        stacked([free[key][0][: both[key]] for key in keys]),
        stacked([free[key][1][: both[key]] for key in keys]),
    )


def _layout(steps: np.ndarray, highest: float, prompts: int) -> dict[str, Any]:
    divider = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "paper", "y0": 0.3, "y1": 0.3}
    return {
        "xaxis": axis(STEP, anchor="y2", **step_range(len(steps))),
        "yaxis": axis("mean KL, nats", domain=[0.36, 1], range=[0, 1.06 * highest or 1]),
        "yaxis2": axis("prompts", domain=[0, 0.24], range=[0, prompts * 1.08], nticks=4),
        "hovermode": "x unified",
        "shapes": [divider | {"line": {"color": GRID, "width": 1}}],
    }


@dataclass(frozen=True)
class SplitRow:
    """A range of steps: the KL read, the KL run freely, what is added, and how many prompts had not diverged."""

    steps: str
    alone: str
    together: str
    added: str
    added_interval: str
    same: str


def split_rows(run: Run, index: int) -> list[SplitRow]:
    """The split of S6 by ranges of steps: 1-8, 9-16, 17-32, and so on twice as long."""
    forced, free, differ = _paired(run.tables["steps"], run.info["compressed"][index]["label"])
    return [_split_row(forced, free, differ, low, high) for low, high in _ranges(forced.shape[1])]


def _ranges(last: int) -> list[tuple[int, int]]:
    """Half-open ranges of steps counted from 0 that cover `last` steps."""
    starts = [0] if last else []
    while starts and max(2 * starts[-1], FIRST_RANGE) < last:
        starts.append(max(2 * starts[-1], FIRST_RANGE))
    return list(zip(starts, [*starts[1:], last], strict=True)) if starts else []


def _split_row(forced: np.ndarray, free: np.ndarray, differ: np.ndarray, low: int, high: int) -> SplitRow:
    read, run_freely = forced[:, low:high], free[:, low:high]
    counts = np.isfinite(read).sum(axis=1)
    kept = counts > 0
    totals = np.nansum(run_freely - read, axis=1)
    added = ratio_interval(totals[kept], counts[kept].astype(float))
    last = differ[:, high - 1]
    steps = f"{low + 1}–{high}" if high > low + 1 else f"{high}"
    return SplitRow(
        steps,
        number(float(np.nanmean(read))),
        number(float(np.nanmean(run_freely))),
        number(added.value),
        interval({"low": added.low, "high": added.high}),
        f"{int(np.sum(last == 0))} of {int(np.isfinite(last).sum())} at step {high}",
    )
