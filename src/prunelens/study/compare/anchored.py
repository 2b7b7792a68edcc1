"""Anchors of a comparison: the dense model's own weights rounded, read and compared like a compressed model (A2)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.metrics.head import Pair, stream_pairs
from prunelens.metrics.intervals import Interval
from prunelens.metrics.survival import faithful_length, mean_curve, survival_rows
from prunelens.models.model import Model
from prunelens.progress import Reporter
from prunelens.pruning.anchors import MEANT, Anchor, why_no_anchor
from prunelens.study.compare.free_running import in_pieces
from prunelens.study.compare.settings import Settings
from prunelens.study.compare.summary import SURVIVAL_AT, token_mean
from prunelens.study.compare.tables import anchors_rows
from prunelens.study.rows import by_prompt, rows_of
from prunelens.study.spool import Spool
from prunelens.tasks.prompts import Prompt
from prunelens.tracing.forced import Trajectory, forced_states

MOST_PROMPTS = 24
"""Prompts whose texts the anchors read, spread evenly over all of them."""


def measure_anchors(
    dense: Model,
    prompts: Sequence[Prompt],
    trajectories: Sequence[Trajectory],
    states: Tensor,
    settings: Settings,
    spool: Spool,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Read the dense model's texts with its weights rounded; rows go to the table `anchors`.

    Args:
        dense: the dense model.
        prompts: all prompts.
        trajectories: its texts.
        states: (T, d), its states at all their steps.
        settings: which anchors, and the temperature.
        spool: takes the rows.
        reporter: progress display.

    Returns:
        For each anchor what it is and, where the model cannot be rounded so, why; numbers come from the table.
    """
    chosen = _chosen(len(prompts))
    texts = [text for text in trajectories if text.prompt in chosen]
    reading = _Reading(dense, prompts, texts, _rows(trajectories, chosen, states), settings.temperature, reporter)
    found = []
    for kind in settings.anchors:
        about, reason = {"anchor": kind, "meant": MEANT[kind]}, why_no_anchor(dense, kind)
        if not reason:
            spool.add("anchors", reading.tables(Anchor(dense, kind)))
        found.append(about | ({"reason": reason} if reason else {"prompts": len(chosen)}))
    return found


def _chosen(count: int) -> set[int]:
    if count <= MOST_PROMPTS:
        return set(range(count))
    return {count * place // MOST_PROMPTS for place in range(MOST_PROMPTS)}


def _rows(trajectories: Sequence[Trajectory], chosen: set[int], states: Tensor) -> Tensor:
    """The states at the steps of the chosen prompts' texts."""
    keep = [text.prompt in chosen for text in trajectories for _ in text.token_ids]
    return states[torch.tensor(keep, device=states.device)]


@dataclass(frozen=True)
class _Reading:
    """What every anchor reads, and the dense states it is compared with."""

    dense: Model
    prompts: Sequence[Prompt]
    texts: Sequence[Trajectory]
    states: Tensor
    temperature: float
    reporter: Reporter

    def tables(self, anchor: Anchor) -> Iterator[pa.Table]:
        """Rows of `anchors`, piece by piece."""
        advance = self.reporter(f"anchor {anchor.kind} reads", sum(len(text.read_ids) for text in self.texts))
        with anchor.running():
            own = forced_states(self.dense, self.texts, advance=advance)[0]
        advance = self.reporter(f"comparing the anchor {anchor.kind}", len(own))
        for rows, piece in in_pieces(self.texts):
            tokens = torch.tensor([token for text in piece for token in text.token_ids])
            pairs = [Pair(own[rows], anchor.head)]
            try:
                (stats,) = stream_pairs(self.states[rows], self.dense.head, pairs, tokens, self.temperature, advance)
            except ValueError as error:
                raise PrunelensError(
                    f"{error}: the anchor {anchor.kind} overflows in {self.dense.dtype}; use --dtype float32 or "
                    "--anchors none"
                ) from error
            yield anchors_rows(anchor.kind, self.prompts, piece, stats)


def summarise_anchors(anchors: Sequence[Mapping[str, Any]], table: pa.Table, horizon: int) -> list[dict[str, Any]]:
    """The same numbers of each anchor as of a compressed model."""
    return [
        dict(anchor)
        if "reason" in anchor
        else dict(anchor) | _numbers(rows_of(table, anchor=anchor["anchor"]), horizon)
        for anchor in anchors
    ]


def _numbers(rows: pa.Table, horizon: int) -> dict[str, Any]:
    greedy, sampled = rows_of(rows, trace="greedy"), rows_of(rows, trace="sampled")
    texts = by_prompt(sampled, "acceptance", "tv")
    mean, low, high = mean_curve(survival_rows([text[1] for text in texts], [text[2] for text in texts], horizon))
    median = faithful_length(mean)
    return {
        "kl": _ends(token_mean(greedy, "kl_dense_compressed")),
        "tv": _ends(token_mean(greedy, "tv")),
        "same_top1": _ends(token_mean(greedy, "same_top1")),
        "survival": {
            str(n): {"value": float(mean[n - 1]), "low": float(low[n - 1]), "high": float(high[n - 1])}
            for n in SURVIVAL_AT
            if n <= horizon
        },
        "curve": [float(value) for value in mean],
        "faithful_length": {"median": median, "beyond_horizon": median == horizon, "horizon": horizon},
    }


def _ends(interval: Interval) -> dict[str, float]:
    return {"mean": interval.value, "low": interval.low, "high": interval.high}
