"""What the verbs return: tables, the content of run.json, and ways to keep and show them."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from prunelens.study.advise.tables import ADVICE
from prunelens.study.compare.schemas import RUN
from prunelens.study.evaluate.tables import EVALUATION
from prunelens.study.evaluate.verdict import predict
from prunelens.study.store import PAGE, Run, open_run
from prunelens.study.sweep.sweep import SWEEP


class Result:
    """A stored result: its tables and the content of its run.json."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def tables(self) -> dict[str, pa.Table]:
        """Arrow tables by name; `.to_pandas()` where pandas is installed."""
        return self._run.tables

    @property
    def info(self) -> dict[str, Any]:
        """The content of run.json."""
        return self._run.info


class Comparison(Result):
    """A finished comparison.

    Attributes:
        tables: Arrow tables by name (`steps`, `survival`, …).
        info: the content of run.json.
        summary: one record per compressed model.
    """

    @classmethod
    def open(cls, folder: str | Path) -> "Comparison":
        """Read a stored run.

        Raises:
            PrunelensError: no run there, or a damaged one.
        """
        return cls(open_run(Path(folder), RUN))

    @property
    def summary(self) -> list[dict[str, Any]]:
        """One record per compressed model."""
        found: list[dict[str, Any]] = self.info["summary"]
        return found

    @property
    def verdict(self) -> dict[str, list[dict[str, Any]]]:
        """What the comparison predicts for each class of use, by compressed model; `evaluate` measures it."""
        return {record["compressed"]: [line.as_dict() for line in predict(record)] for record in self.summary}

    def report(self, folder: str | Path) -> Path:
        """Write tables, run.json and the page into `folder`, whole or not at all; return the page's path.

        Raises:
            PrunelensError: the folder exists and is not a run, or cannot be written; or the page alone cannot be made.
        """
        from prunelens.report.pages.compare import render_page

        return RUN.write(self._run, Path(folder), render_page)

    def _repr_html_(self) -> str:
        from prunelens.report.pages.compare import render_summary

        return render_summary(self._run)


class Evaluation(Result):
    """What models did on tasks, item by item, and for which uses each compressed one is safe.

    Attributes:
        tables: `tasks` (a value for each model, metric and item) and `texts` (the long texts).
        info: the content of run.json.
        summary: for each compressed model its scores beside the dense ones, and its verdicts.
    """

    @classmethod
    def open(cls, folder: str | Path) -> "Evaluation":
        """Read a stored evaluation.

        Raises:
            PrunelensError: none there, or a damaged one.
        """
        return cls(open_run(Path(folder), EVALUATION))

    @property
    def summary(self) -> list[dict[str, Any]]:
        """One record per compressed model."""
        found: list[dict[str, Any]] = self._run.info["summary"]
        return found

    @property
    def verdict(self) -> dict[str, list[dict[str, Any]]]:
        """One line for each class of use, by compressed model."""
        return {record["compressed"]: record["verdicts"] for record in self.summary}

    def report(self, folder: str | Path) -> Path:
        """Write tables, run.json and the page into `folder`, whole or not at all; return the page's path.

        Raises:
            PrunelensError: the folder exists and is not an evaluation, or cannot be written; or the page alone cannot
                be made.
        """
        from prunelens.report.pages.evaluate import render_evaluation

        return EVALUATION.write(self._run, Path(folder), render_evaluation)

    def _repr_html_(self) -> str:
        from prunelens.report.pages.evaluate import render_evaluation_summary

        return render_evaluation_summary(self._run)


class Sweep(Result):
    """What a sweep found: a row for each cell, its scores and its verdicts.

    Attributes:
        tables: `cells`, `scores` and `verdicts`.
        info: the content of run.json: the study, what each prediction was worth, and models of equal choice.
        folder: where it lies.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        super().__init__(run)
        self.folder = folder

    @classmethod
    def open(cls, folder: str | Path) -> "Sweep":
        """Read a sweep that has ended.

        Raises:
            PrunelensError: none there, or a damaged one.
        """
        return cls(open_run(Path(folder), SWEEP), Path(folder))

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Cells that ended in an error, with it."""
        return [row for row in self.tables["cells"].to_pylist() if row["status"] == "failed"]

    @property
    def page(self) -> Path:
        """Where the page lies."""
        return self.folder / PAGE

    def _repr_html_(self) -> str:
        from prunelens.report.pages.sweep import render_sweep_summary

        return render_sweep_summary(self._run)


class Advice(Result):
    """The strongest recipe found that keeps a use, what it was held against, and what it breaks.

    Attributes:
        tables: `tried` and `held_out`.
        info: the content of run.json.
        folder: where it lies.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        super().__init__(run)
        self.folder = folder

    @classmethod
    def open(cls, folder: str | Path) -> "Advice":
        """Read stored advice.

        Raises:
            PrunelensError: none there, or damaged.
        """
        return cls(open_run(Path(folder), ADVICE), Path(folder))

    @property
    def recipe(self) -> str | None:
        """The recipe that is advised; None where nothing that was tried keeps the use."""
        chosen = self.info["chosen"]
        return chosen["recipe"] if chosen else None

    @property
    def page(self) -> Path:
        """Where the page lies."""
        return self.folder / PAGE

    def _repr_html_(self) -> str:
        from prunelens.report.pages.advise import render_advice_summary

        return render_advice_summary(self._run)
