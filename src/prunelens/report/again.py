"""The page of a stored result again, whatever kind it is."""

from pathlib import Path

from prunelens.report.advice_page import render_advice
from prunelens.report.evaluation_page import render_evaluation
from prunelens.report.page import render_page
from prunelens.report.sweep_page import render_sweep
from prunelens.study.advice import ADVICE
from prunelens.study.evaluation import EVALUATION
from prunelens.study.store import read_run
from prunelens.study.sweep import SWEEP


def render_again(folder: Path) -> str:
    """The page of the result in a folder, from its tables alone.

    Raises:
        PrunelensError: no result there, or a damaged one.
    """
    if SWEEP.is_here(folder):
        return render_sweep(read_run(folder, SWEEP))
    if ADVICE.is_here(folder):
        return render_advice(read_run(folder, ADVICE))
    if EVALUATION.is_here(folder):
        return render_evaluation(read_run(folder, EVALUATION))
    return render_page(read_run(folder))
