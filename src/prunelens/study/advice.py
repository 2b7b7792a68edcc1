"""The result of a search for the strongest recipe that keeps a use."""

from pathlib import Path

import pyarrow as pa

from prunelens.study.store import Kind, Result, Run
from prunelens.study.stored import open_run

SCHEMAS = {
    "tried": pa.schema(
        [
            ("recipe", pa.string()),
            ("family", pa.string()),
            ("size", pa.float64()),
            ("parameters_saved", pa.float64()),
            ("bytes_saved", pa.float64()),
            ("zeros", pa.float64()),
            ("kl", pa.float64()),
            ("loss", pa.float64()),
            ("keeps", pa.bool_()),
            ("number", pa.string()),
        ]
    ),
    "held_out": pa.schema(
        [
            ("recipe", pa.string()),
            ("role", pa.string()),
            ("prompt_id", pa.string()),
            ("kl", pa.float64()),
        ]
    ),
}
"""`tried`: what the search measured; `held_out`: mean KL on each prompt that the search did not see."""

ADVICE = Kind(
    "prunelens-advice", 2, SCHEMAS, ("dense", "aim", "chosen", "held_out", "verdicts"), "advice folder", "advise"
)


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
        return self.folder / "report.html"

    def _repr_html_(self) -> str:
        from prunelens.report.advice_page import render_advice_summary

        return render_advice_summary(self._run)
