"""What the verbs return: tables, the content of run.json, and ways to keep and show them."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from prunelens.errors import PrunelensError, nearest, shown
from prunelens.study.advise.record import Trial
from prunelens.study.advise.tables import ADVICE
from prunelens.study.compare.record import ComparedModel
from prunelens.study.compare.schemas import RUN
from prunelens.study.evaluate.record import Judged, Line
from prunelens.study.evaluate.tables import EVALUATION
from prunelens.study.rows import survival_points
from prunelens.study.store import PAGE, Run, open_run
from prunelens.study.sweep.record import Cell
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
    """A finished comparison: `result["drop-attention:8"]` is one compressed model, iteration gives them all.

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

    @cached_property
    def models(self) -> dict[str, ComparedModel]:
        """Every compressed model by its label."""
        return {
            record["compressed"]: ComparedModel.model_validate(
                record | {"survival": survival_points(self.tables["survival"], record["compressed"])}
            )
            for record in self.summary
        }

    def __getitem__(self, label: str) -> ComparedModel:
        """One compressed model by its label.

        Raises:
            PrunelensError: none of that name.
        """
        return _named(label, self.models)

    def __iter__(self) -> Iterator[ComparedModel]:
        return iter(self.models.values())

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


class EvaluatedModel(Judged):
    """One compressed model of an evaluation: `scores`, and `verdicts` for each class of use."""

    def verdict(self, use: str) -> Line:
        """The verdict for a class of use, such as `long-generation`.

        Raises:
            PrunelensError: no such use.
        """
        return _named(use, {line.use: line for line in self.verdicts})


class Evaluation(Result):
    """What models did on tasks, item by item, and for which uses each compressed one is safe, degraded or broken.

    `result["drop-attention:8"]` is one compressed model, iteration gives them all.

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

    @cached_property
    def models(self) -> dict[str, EvaluatedModel]:
        """Every compressed model by its label."""
        return {record["compressed"]: EvaluatedModel.model_validate(record) for record in self.summary}

    def __getitem__(self, label: str) -> EvaluatedModel:
        """One compressed model by its label.

        Raises:
            PrunelensError: none of that name.
        """
        return _named(label, self.models)

    def __iter__(self) -> Iterator[EvaluatedModel]:
        return iter(self.models.values())

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

    @cached_property
    def cells(self) -> list[Cell]:
        """Every cell: recipe, seed, how it ended, what it saved, its verdicts."""
        return [Cell.model_validate(record) for record in self.info["summary"]]

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

    @cached_property
    def chosen(self) -> Trial | None:
        """What is advised, how much it saves and where it loads; None where nothing that was tried keeps the use."""
        return _tried(self.info["chosen"])

    @cached_property
    def runner_up(self) -> Trial | None:
        """The strongest of another family that keeps the use."""
        return _tried(self.info["runner_up"])

    @cached_property
    def verdicts(self) -> list[Line]:
        """What was chosen on the items that the search did not see, for each class of use."""
        return [Line.model_validate(line) for line in self.info["verdicts"]]

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


T = TypeVar("T")


def _named(name: str, known: dict[str, T]) -> T:
    if name not in known:
        raise PrunelensError(f"expected one of {', '.join(known)}, found {shown(name)}{nearest(str(name), known)}")
    return known[name]


def _tried(record: dict[str, Any] | None) -> Trial | None:
    return Trial.model_validate(record) if record is not None else None
