"""An evaluation that was killed resumes: nothing is asked twice, and the result is the undisturbed one."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import CACHE, text_model
from prunelens.api import evaluate
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
