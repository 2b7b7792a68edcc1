"""The simulations behind docs/coverage.md, with few runs: coverage, wrong words and power within their bounds."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

RUNS = 200


@pytest.fixture(scope="module")
def simulated() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [16, 112])
def test_every_interval_holds_the_truth(simulated: ModuleType, size: int) -> None:
    """At least 93 %, less two standard errors of 200 runs."""
    for title, cases in simulated.CASES.items():
        for name, truth, draw in cases[::2]:
            below, above = simulated.misses(draw, truth, size, RUNS, 1)
            assert below + above <= 0.07 + 0.036, (title, name)


@pytest.mark.parametrize("size", [64, 224])
def test_wrong_words_are_rare(simulated: ModuleType, size: int) -> None:
    for truth, gains, wrong in (
        (0.94, 0.0, "safe"),
        (0.94, 0.04, "safe"),
        (0.81, 0.0, "broken"),
        (0.95, 0.02, "degraded"),
    ):
        said = simulated._said(
            simulated.KEPT, lambda g, n, t=truth, s=gains: simulated._kept(g, n, t, s), size, RUNS, 2
        )
        assert said.count(wrong) <= (0.05 + 0.03) * RUNS, (truth, wrong)


def test_equal_models_are_found_safe_often_enough(simulated: ModuleType) -> None:
    said = simulated._said(simulated.KEPT, lambda g, n: simulated._kept(g, n, 1.0, 0.02), 224, RUNS, 3)
    assert said.count("safe") >= 0.55 * RUNS
    said = simulated._said(simulated.KEPT, lambda g, n: simulated._kept(g, n, 0.4, 0.02), 64, RUNS, 3)
    assert said.count("broken") >= 0.95 * RUNS


def test_the_tables_are_printed(
    simulated: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated, "SIZES", (8,))
    monkeypatch.setattr(simulated, "LOOKS", 60)
    monkeypatch.setattr(sys, "argv", ["coverage.py", "--runs", "2"])
    simulated.main()
    text = capsys.readouterr().out
    assert text.count("### ") == len(simulated.CASES) + 3
    assert "safe (wrong)" in text
