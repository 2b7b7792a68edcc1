"""An evaluation that was killed resumes: nothing is asked twice, and the result is the undisturbed one."""

import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import CACHE, text_model
from prunelens.api import evaluate
from prunelens.models.model import Model
from prunelens.progress import silent

RECIPES = ("drop-mlp@1", "magnitude:0.5")
SETTINGS: dict[str, Any] = {"tasks": ("core_choice", "core_facts", "core_long"), "limit": 4, "long_tokens": 4}
IN_CHILD = multiprocessing.get_context("fork")


def killed_at(stage: str) -> Callable[[str, int], Callable[[int], None]]:
    """Ends the process without a word when a stage begins."""

    def reporter(name: str, total: int) -> Callable[[int], None]:
        if name == stage:
            os.kill(os.getpid(), signal.SIGKILL)
        return lambda done: None

    return reporter


def run(folder: Path | None, reporter: Any = silent, *recipes: str, **settings: Any) -> Any:
    return evaluate(text_model(), *(recipes or RECIPES), reporter=reporter, unfinished=folder, **(SETTINGS | settings))


@pytest.mark.parametrize("stage", ["drop-mlp@1: core_facts", "magnitude:0.5: core_long"])
def test_a_killed_evaluation_resumes(tmp_path: Path, stage: str) -> None:
    expected = run(None)
    for path in (CACHE / "answers").rglob("*.json"):
        path.unlink()
    child = IN_CHILD.Process(target=run, args=(tmp_path / "kept", killed_at(stage)))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    asked: list[str] = []

    def reporter(name: str, total: int) -> Callable[[int], None]:
        asked.append(name)
        return lambda done: None

    found = run(tmp_path / "kept", reporter)
    assert found.tables == expected.tables
    assert found.summary == expected.summary
    done = {"drop-mlp@1": 4} if "drop" in stage else {"drop-mlp@1": 12, "magnitude:0.5": 8}
    told = [note for note in found.info["notes"] if "stopped" in note]
    assert told == [f"{label}: answers from a run that was stopped ({count} items)" for label, count in done.items()]
    assert ("drop-mlp@1: core_long" in asked) == ("drop" in stage)
    assert "magnitude:0.5: core_long" in asked


def killed_after(steps: int) -> Callable[[str, int], Callable[[int], None]]:
    """Ends the process without a word after so many steps of progress, whatever runs then."""
    left = [steps]

    def advance(done: int) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda name, total: advance


def sharp() -> Model:
    """The tiny model with larger logits, whose texts are atypical."""
    found = text_model()
    found.network.lm_head.weight.data *= 60
    return replace(found, name="sharp")


def raced(folder: Path | None, reporter: Any) -> Any:
    given: dict[str, Any] = {"tasks": ("core_facts", "core_long"), "limit": 48, "long_tokens": 6}
    return evaluate(text_model(), sharp(), "drop-mlp@1", reporter=reporter, unfinished=folder, **given)


def test_a_race_that_is_killed_anywhere_resumes_with_the_same_result(tmp_path: Path) -> None:
    steps: list[int] = []
    expected = raced(None, lambda name, total: steps.append)
    early = {one.compressed for one in expected for line in one.verdicts if line.stopped_early}
    assert "sharp" in early
    for path in (CACHE / "answers").rglob("*.json"):
        path.unlink()
    generator = random.Random(5)
    for place in sorted(generator.sample(range(2, len(steps)), 5)):
        child = IN_CHILD.Process(target=raced, args=(tmp_path / f"{place}", killed_after(place)))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        found = raced(tmp_path / f"{place}", silent)
        assert found.tables == expected.tables
        assert found.summary == expected.summary
        for path in (CACHE / "answers").rglob("*.json"):
            path.unlink()


@pytest.mark.parametrize(
    ("recipe", "settings"), [("magnitude:0.4", {}), ("drop-mlp@2", {}), ("magnitude:0.5", {"seed": 1})]
)
def test_other_work_finds_nothing_there(tmp_path: Path, recipe: str, settings: dict[str, Any]) -> None:
    run(tmp_path / "kept")
    found = run(tmp_path / "kept", silent, recipe, **settings)
    assert not any("stopped" in note for note in found.info["notes"])
    again = run(tmp_path / "kept", silent, recipe, **settings)
    assert any("stopped" in note for note in again.info["notes"])


def test_nothing_is_kept_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(None)
    assert not list(tmp_path.iterdir())
