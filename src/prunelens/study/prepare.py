"""Make the compressed models of a run from their recipes: calibrate, rank, apply."""

from collections.abc import Sequence
from pathlib import Path

from prunelens.models.model import Model
from prunelens.progress import Reporter
from prunelens.pruning.apply import apply
from prunelens.pruning.pruned import Calibration
from prunelens.pruning.redundancy import Ranking, rank_redundancy
from prunelens.study.calibration_texts import calibrate
from prunelens.study.candidates import Candidate


def prepare(
    candidates: Sequence[Candidate],
    dense: Model,
    calibration: Path | None,
    reporter: Reporter,
    seed: int,
    reported: Sequence[str] = (),
) -> None:
    """Calibrate, rank where a recipe counts, and apply every recipe.

    Args:
        candidates: those with a recipe get what it makes.
        dense: the model that the recipes change.
        calibration: text, JSONL or .npy of token ids; None for the dense model's own texts.
        reporter: progress display.
        seed: of experts that are dropped at random.
        reported: texts that results are reported on, which no repair may be fitted on.

    Raises:
        PrunelensError: calibration texts that cannot be read, or a recipe that the model cannot take.
    """
    recipes = [candidate.recipe for candidate in candidates if candidate.recipe is not None]
    texts = calibrate(recipes, dense, calibration, reporter, reported)
    counted = any(recipe.needs_ranking for recipe in recipes)
    ranking = rank(dense, texts.texts, reporter) if counted else None
    apply_recipes(candidates, dense, texts, ranking, reporter, seed)


def rank(dense: Model, texts: Sequence[Sequence[int]], reporter: Reporter) -> Ranking:
    """The dense model's sublayers and blocks, ranked on texts in one pass."""
    return rank_redundancy(dense, texts, advance=reporter("ranking sublayers", sum(map(len, texts))))


def apply_recipes(
    candidates: Sequence[Candidate],
    dense: Model,
    calibration: Calibration,
    ranking: Ranking | None,
    reporter: Reporter,
    seed: int,
) -> None:
    """Make every compressed model that is given as a recipe."""
    for candidate in candidates:
        if candidate.recipe is not None:
            candidate.pruned = apply(candidate.recipe, dense, calibration, ranking, reporter, seed)
