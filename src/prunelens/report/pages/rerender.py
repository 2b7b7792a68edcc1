"""The page of a stored result again, whatever kind it is."""

from collections.abc import Callable
from pathlib import Path

from prunelens.errors import PrunelensError, shown
from prunelens.report.pages.advise import render_advice
from prunelens.report.pages.compare import render_page
from prunelens.report.pages.evaluate import render_evaluation
from prunelens.report.pages.sweep import render_sweep
from prunelens.study.advise.tables import ADVICE
from prunelens.study.compare.schemas import RUN
from prunelens.study.evaluate.tables import EVALUATION
from prunelens.study.store import Kind, Run, format_of, open_run
from prunelens.study.sweep.sweep import SWEEP

PAGES: dict[str, tuple[Kind, Callable[[Run], str]]] = {
    kind.format: (kind, render)
    for kind, render in (
        (RUN, render_page),
        (EVALUATION, render_evaluation),
        (SWEEP, render_sweep),
        (ADVICE, render_advice),
    )
}


def render_again(folder: Path) -> str:
    """The page of the result in a folder, from its tables alone.

    Raises:
        PrunelensError: no result there, or a damaged one.
    """
    kind, render = PAGES.get(format_of(folder) or "", PAGES[RUN.format])
    run = open_run(folder, kind)
    try:
        return render(run)
    except Exception as error:  # every field is there and of its type, and yet they contradict one another
        reason = shown(f"{type(error).__name__}: {error}")
        raise PrunelensError(
            f"the {kind.what} in {folder} is damaged: its tables and run.json contradict one another ({reason}); run "
            f"{kind.command} again"
        ) from error
