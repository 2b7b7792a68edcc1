"""evaluate, sweep and advise on the command line: bad input is one sentence, exit code 2 and nothing left behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import text_network, text_tokenizer
from test_cli import Cli, cli, refused, tree  # noqa: F401  (a fixture)

STUDY = """
model: model
recipes: [drop-attention: [1, 2], drop-mlp@1]
tasks: [core_choice]
compare: {num_prompts: 2, max_new_tokens: 4}
evaluate: {limit: 4}
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text-model")
    text_network().save_pretrained(folder / "model")
    text_tokenizer().save_pretrained(folder / "model")
    return folder


@pytest.fixture
def work(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a checkpoint `model` that reads text, and `study.yaml`."""
    folder = tmp_path / "work"
    shutil.copytree(saved, folder)
    (folder / "study.yaml").write_text(STUDY, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return folder


BAD_EVALUATIONS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("model", "drop-attention:1", "--tasks", "core_choise"), ("no task 'core_choise'", "core_choice")),
    (("model", "drop-attention:1", "--tasks", ""), ("name of a task",)),
    (("model", "drop-attention:1", "--tasks", "core_choice,,core_facts"), ("name of a task",)),
    (("model", "drop-attention:1", "--tasks", "core_choice,core_choice"), ("core_choice", "twice")),
    (("model", "drop-attention:1", "--tasks", "core,core_long"), ("core_long", "twice")),
    (("model", "drop-attention:1", "--limit", "1"), ("--limit", "found 1")),
    (("model", "drop-attention:1", "--batch-size", "0"), ("--batch-size",)),
    (("model", "drop-attention:1", "--long-tokens", "0"), ("--long-tokens",)),
    (("model", "drop-attention:1", "--long-tokens", "5000", "--tasks", "core_long"), ("context", "1024")),
    (("model", "drop-attention:1", "--pooling", "first"), ("--pooling", "'first'")),
    (("model", "drop-attentoin:1"), ("drop-attentoin:1",)),
    (("model", "drop-attention:99"), ("drop-attention:99",)),
    (("model", "drop-attention:1", "drop-attention:1"), ("twice",)),
    (("nowhere/at/all", "drop-attention:1"), ("nowhere/at/all",)),
    (("model", "drop-attention:1", "--calibration", "none.txt", "--tasks", "core_choice"), ("none.txt",)),
    (("model", "drop-attention:1", "-o", "study.yaml"), ("study.yaml",)),
]


@pytest.mark.parametrize(("argv", "parts"), BAD_EVALUATIONS)
def test_a_bad_evaluation_is_refused(cli: Cli, work: Path, argv: tuple[str, ...], parts: tuple[str, ...]) -> None:  # noqa: F811
    said = refused(cli, work, "evaluate", *argv)
    assert all(part in said for part in parts), said


BAD_STUDIES: list[tuple[str, tuple[str, ...]]] = [
    ("", ("nothing",)),
    ("- a list\n", ("list",)),
    ("model: [\n", ("YAML",)),
    ("recipes: [drop-mlp:1]\n", ("'model'", "missing")),
    ("model: model\n", ("'recipes'", "missing")),
    ("model: model\nrecipes: []\n", ("recipes",)),
    ("model: model\nrecipes: drop-mlp:1\n", ("list of recipes",)),
    ("model: model\nrecipe: [drop-mlp:1]\nrecipes: [drop-mlp:1]\n", ("'recipe'", "did you mean recipes")),
    ("model: model\nrecipes: [drop-mlp:1]\ncompare: {num_prompt: 3}\n", ("num_prompt", "did you mean num_prompts")),
    ("model: model\nrecipes: [drop-mlp:1]\nthresholds: {save: 1}\n", ("save", "did you mean safe")),
    ("model: model\nrecipes: [drop-mlp:1]\nthresholds: {safe: 0.5}\n", ("broken", "below safe")),
    ("model: model\nrecipes: [wanda: 0.5]\n", ("list of strengths", "wanda")),
    ("model: model\nrecipes: [wonda:0.5]\n", ("wonda:0.5",)),
    ("model: model\nrecipes: [drop-mlp:1, drop-mlp:1]\n", ("drop-mlp:1", "twice")),
    ("model: model\nrecipes: [drop-mlp:1]\nseeds: [0, 0]\n", ("seed", "twice")),
    ("model: model\nrecipes: [drop-mlp:1]\nseeds: []\n", ("seeds",)),
    ("model: model\nrecipes: [drop-mlp:1]\ntasks: []\n", ("at least one task",)),
    ("model: model\nrecipes: [drop-mlp:1]\ntasks: {multiple-choice: []}\n", ("multiple-choice", "no task")),
    (
        "model: model\nrecipes: [drop-mlp:1]\ntasks: {multiple-choise: [core_choice]}\n",
        ("did you mean multiple-choice",),
    ),
    ("model: model\nrecipes: [drop-mlp:1]\ntasks: [core_choise]\n", ("did you mean core_choice",)),
    ("model: model\nrecipes: [drop-mlp:1]\ntasks: null\ncompare: null\n", ("neither",)),
    ("model: model\nrecipes: [drop-mlp:1]\ncompare: {temperature: 0}\n", ("temperature",)),
    ("model: model\nrecipes: [drop-mlp:1]\nevaluate: {limit: 0}\n", ("--limit",)),
    ("model: model\nrecipes: [drop-mlp:1]\ncompare: {prompts: none.txt}\n", ("none.txt",)),
    ("model: model\nrecipes: [drop-mlp:1]\ncalibration: none.txt\n", ("none.txt",)),
    ("model: nowhere/at/all\nrecipes: [drop-mlp:1]\n", ("nowhere/at/all",)),
]


@pytest.mark.parametrize(("document", "parts"), BAD_STUDIES)
def test_a_bad_study_is_refused(cli: Cli, work: Path, document: str, parts: tuple[str, ...]) -> None:  # noqa: F811
    (work / "bad.yaml").write_text(document, encoding="utf-8")
    said = refused(cli, work, "sweep", "bad.yaml", "-o", "out")
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("none.yaml",), ("none.yaml",)),
        (("study.yaml", "--executor", "slurm"), ("'slurm'", "local, ray")),
        (("study.yaml", "--workers", "0"), ("--workers of at least 1",)),
        (("study.yaml", "-o", "model"), ("model", "apart from what is read")),
        (("study.yaml", "-o", "study.yaml"), ("study.yaml", "not a sweep")),
    ],
)
def test_a_bad_sweep_is_refused(cli: Cli, work: Path, argv: tuple[str, ...], parts: tuple[str, ...]) -> None:  # noqa: F811
    said = refused(cli, work, "sweep", *argv)
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("model", "--for", "multiple-choise"), ("did you mean multiple-choice",)),
        (("model",), ("--for",)),
        (("model", "--for", "retrieval", "--keep", "1"), ("--keep", "found 1")),
        (("model", "--for", "retrieval", "--keep", "0.2"), ("--keep",)),
        (("model", "--for", "retrieval", "--budget", "0"), ("--budget", "found 0")),
        (("model", "--for", "retrieval", "--tasks", "core_choise"), ("did you mean core_choice",)),
        (("nowhere/at/all", "--for", "retrieval"), ("nowhere/at/all",)),
        (("model", "--for", "retrieval", "-o", "model"), ("model", "apart from what is read")),
        (("model", "--for", "multiple-choice", "--limit", "1"), ("--limit",)),
    ],
)
def test_bad_advice_is_refused(cli: Cli, work: Path, argv: tuple[str, ...], parts: tuple[str, ...]) -> None:  # noqa: F811
    said = refused(cli, work, "advise", *argv)
    assert all(part in said for part in parts), said


def test_an_evaluation_is_whole_and_reported_again(cli: Cli, work: Path) -> None:  # noqa: F811
    argv = ["model", "drop-attention@1", "--tasks", "core_choice,core_long", "--limit", "4", "--long-tokens", "8"]
    code, printed, said = cli("evaluate", *argv, "-o", "out", "--json")
    assert (code, said) == (0, "")
    answer: dict[str, Any] = json.loads(printed)
    assert [row["compressed"] for row in answer["summary"]] == ["drop-attention@1"]
    before = tree(work / "out")
    assert set(before) == {"run.json", "tasks.parquet", "texts.parquet", "report.html"}
    code, printed, said = cli("report", "out")
    assert (code, printed.strip(), said) == (0, "out/report.html", "")
    assert tree(work / "out") == before


def test_tables_are_for_people(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("COLUMNS", "160")
    code, printed, said = cli(
        "evaluate", "model", "drop-attention@1", "--tasks", "core_letters", "--limit", "4", "-o", "out", "--full"
    )
    assert (code, said) == (0, "")
    for word in ("Can it replace model?", "not measured", "core_letters (4)", "chance", "25.0 %", "out/report.html"):
        assert word in printed
