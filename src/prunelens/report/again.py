"""The page of a stored result again, whatever kind it is."""

from pathlib import Path

from prunelens.report.evaluation_page import render_evaluation
from prunelens.report.page import render_page
from prunelens.study.evaluation import EVALUATION
from prunelens.study.store import read_run


def render_again(folder: Path) -> str:
    """The page of the result in a folder, from its tables alone.

    Raises:
        PrunelensError: no result there, or a damaged one.
    """
    if EVALUATION.is_here(folder):
        return render_evaluation(read_run(folder, EVALUATION))
    return render_page(read_run(folder))
