"""What a search is for: the use to keep, what a recipe loses of it, and the recipes that were tried."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.study.evaluate.scores import score_rows
from prunelens.tasks.suite import MetricScores

DROPS, REPAIRED = "drops", "repaired drops"


@dataclass(frozen=True)
class Goal:
    """A class of use, and the share of what the dense model does that is to be kept."""

    use: str
    keep: float = 0.95

    @property
    def tolerance(self) -> float:
        """The most that may be lost: a share of the score; for long texts, of loops, and twice it in nats."""
        return 1 - self.keep


@dataclass
class Trial:
    """One recipe as the search has judged it; `loss` counts in tolerances, so that at most 1 keeps the use."""

    recipe: str
    family: str
    size: float
    parameters_saved: float
    bytes_saved: float
    zeros: float
    loss: float
    keeps: bool
    number: str
    kl: float | None = None

    @property
    def is_drop(self) -> bool:
        """Whether it takes sublayers out and no more, repaired or not."""
        return self.family in (DROPS, REPAIRED) or self.family.startswith(f"{DROPS} by ")

    def row(self) -> dict[str, Any]:
        """For the table `tried`."""
        return asdict(self)


def strength(tried: Trial) -> tuple[float, float]:
    """What orders recipes: bytes saved, then zeros."""
    return tried.bytes_saved, tried.zeros


def strongest(tried: Sequence[Trial]) -> list[Trial]:
    """Those that keep the use, most bytes saved first; among equals most zeros, then least loss."""
    keeping = [one for one in tried if one.keeps]
    return sorted(keeping, key=lambda one: (-one.bytes_saved, -one.zeros, one.loss))


def loss_of(aim: Goal, dense: Sequence[MetricScores], compressed: Sequence[MetricScores]) -> tuple[float, str]:
    """(loss in tolerances, in words): the worst of the class's deciding numbers; at most 1 keeps the use.

    Raises:
        PrunelensError: the dense model is at chance on every task of the class.
    """
    every = [row for row in score_rows(dense, compressed) if row["use"] == aim.use]
    rows = [row for row in every if row["decides"]]
    deciding = {(one.metric.task, one.metric.name) for one in dense if one.metric.decides}
    missing = [row for row in every if not row["decides"] and (row["task"], row["metric"]) in deciding]
    losses = [_loss(row, aim) for row in rows if row["decides"] in ("nll", "loops")]
    kept = [row for row in rows if row["decides"] == "kept" and not row["at_chance"]]
    added = [row for row in kept if row["adds"]]
    if added:
        share = sum(row["compressed"]["mean"] for row in added) / sum(row["dense"]["mean"] for row in added)
        losses.append(((1 - share) / aim.tolerance, f"{100 * share:.1f} % of the dense score"))
    for row in kept:
        if not row["adds"] and row["kept"]:
            share = row["kept"]["mean"]
            losses.append(((1 - share) / aim.tolerance, f"{100 * share:.1f} % of {row['metric']} on {row['task']}"))
    losses += [(1 / aim.tolerance, f"{row['task']}: {row['reason']}") for row in missing]
    if not losses:
        losses = [_loss(row, aim) for row in rows if row["decides"] == "agreement" and row["kept"]]
    if not losses:
        raise PrunelensError(
            f"the dense model is at chance on every task for {aim.use}, so that nothing can be kept of it; "
            "give other tasks with --tasks"
        )
    return max((round(loss, 9), words) for loss, words in losses)  # rounding breaks no tie with 1


def coarse(aim: Goal, dense: Sequence[MetricScores]) -> list[str]:
    """A remark where the texts are too few for the tolerance: one of them is more than may be lost."""
    counts = [len(one.values) for one in dense if one.metric.decides == "loops"]
    return [
        f"one text of {count} is {100 / count:.1f} points of looping texts, more than the tolerance of "
        f"{100 * aim.tolerance:.3g}: not one more text may loop; a smaller --keep allows more"
        for count in counts
        if 1 / count > aim.tolerance
    ]


def _loss(row: dict[str, Any], aim: Goal) -> tuple[float, str]:
    if row["decides"] == "agreement":
        share = row["kept"]["mean"]
        return (1 - share) / aim.tolerance, f"{100 * share:.1f} % of the neighbours beyond chance"
    more = row["difference"]["mean"]
    if row["decides"] == "nll":
        return more / (2 * aim.tolerance), f"{more:+.3f} nats per token"
    return more / aim.tolerance, f"{100 * more:+.1f} points of looping texts"
