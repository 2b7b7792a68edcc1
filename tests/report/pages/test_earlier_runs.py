"""Results that an earlier version wrote (tests/stored, one of each kind) still open and give their page."""

import shutil
from pathlib import Path

import plotly.offline
import pytest

from prunelens.report.pages.rerender import render_again
from prunelens.results import Advice, Comparison, Evaluation, Sweep

STORED = Path(__file__).parents[2] / "stored"


@pytest.fixture(autouse=True)
def _without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plotly.offline, "get_plotlyjs", lambda: "")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("compare", ("drop-attention:1", "wanda:0.5")),
        ("evaluate", ("drop-attention:1", "magnitude:0.5", "core_choice")),
        ("sweep", ("drop-attention:1", "drop-mlp@1")),
        ("advise", ("long-generation",)),
    ],
)
def test_the_page_is_drawn_again(kind: str, words: tuple[str, ...], tmp_path: Path) -> None:
    page = render_again(Path(shutil.copytree(STORED / kind, tmp_path / kind)))
    assert page.startswith("<!doctype html>")
    assert all(word in page for word in words)


def test_they_open_with_their_attributes(tmp_path: Path) -> None:
    for kind in ("compare", "evaluate", "sweep", "advise"):
        shutil.copytree(STORED / kind, tmp_path / kind)
    compared = Comparison.open(tmp_path / "compare")
    assert [model.compressed for model in compared] == ["drop-attention:1", "wanda:0.5"]
    assert sorted(compared["wanda:0.5"].survival) == [1, 2, 3, 4, 5, 6]
    assert compared["wanda:0.5"].attribution is not None
    evaluated = Evaluation.open(tmp_path / "evaluate")["magnitude:0.5"]
    assert {line.use for line in evaluated.verdicts} >= {"retrieval", "multiple-choice", "long-generation"}
    cells = Sweep.open(tmp_path / "sweep").cells
    assert [(cell.recipe, cell.seed) for cell in cells] == [
        (recipe, seed) for recipe in ("drop-attention:1", "drop-mlp@1") for seed in (0, 1)
    ]
    advice = Advice.open(tmp_path / "advise")
    assert (advice.chosen.recipe if advice.chosen else None) == advice.recipe
