"""What `compare` returns: tables, the summary, and ways to keep and show them."""

from pathlib import Path
from typing import Any

from prunelens.study.store import RUN, Result
from prunelens.study.stored import open_run


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
        return cls(open_run(Path(folder)))

    @property
    def summary(self) -> list[dict[str, Any]]:
        """One record per compressed model."""
        return self._run.info["summary"]

    @property
    def verdict(self) -> dict[str, list[dict[str, Any]]]:
        """What the comparison predicts for each class of use, by compressed model; `evaluate` measures it."""
        from prunelens.study.verdict import predict

        return {record["compressed"]: [line.as_dict() for line in predict(record)] for record in self.summary}

    def report(self, folder: str | Path) -> Path:
        """Write tables, run.json and the page into `folder`, whole or not at all; return the page's path.

        Raises:
            PrunelensError: the folder exists and is not a run, or cannot be written; or the page alone cannot be made.
        """
        from prunelens.report.page import render_page

        return RUN.write(self._run, Path(folder), render_page)

    def _repr_html_(self) -> str:
        from prunelens.report.page import render_summary

        return render_summary(self._run)
