"""Names of tasks: known without loading the harness, odd ones in one sentence, and folders of the same name."""

import subprocess
import sys
from pathlib import Path

import pytest

from prunelens.errors import PrunelensError
from prunelens.study.evaluate.evaluate import check_evaluation
from prunelens.tasks import names
from prunelens.tasks.names import harness_names
from prunelens.tasks.suite import is_retrieval, parse_tasks


def refused(name: str) -> str:
    with pytest.raises(PrunelensError) as error:
        parse_tasks([name])
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["arc_easy", "mmlu", "ai2_arc", "truthfulqa_mc2", "scrolls_qasper", "gsm8k", "wikitext"]
)
def test_tasks_groups_and_tags_of_the_harness_are_known(name: str) -> None:
    assert name in harness_names()
    assert parse_tasks(name).harness == (name,)


def test_names_are_those_that_the_harness_finds() -> None:
    """In a few folders that hold every kind: plain and quoted keys, tags in lists, inherited tags, groups, classes."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    parts = [folder / name for name in ("arc", "glue", "scrolls", "blimp", "aradice", "crows_pairs", "mmlu", "bbh")]
    theirs = set(lm_eval.tasks.TaskManager(include_path=list(map(str, parts)), include_defaults=False).all_tasks)
    ours = {name for part in parts for path in part.glob("**/*.yaml") for name in names._names_in(path)}
    assert len(theirs) > 300
    assert theirs == ours


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("task: plain\n", {"plain"}),
        ("task: plain # a remark\ntag: one\n", {"plain", "one"}),
        ('"task": "quoted"\n"tag":\n- "a"\n- b\n', {"quoted", "a", "b"}),
        ("tag: [a, 'b']\ntask: 'flow'\n", {"flow", "a", "b"}),
        ("group: g\ntask:\n  - one\n  - two\n", {"g"}),
        ("group: g\ntask: one\nclass: !function x.Y\n", {"one"}),
        ("include: base\ntask: own\n", {"own", "inherited"}),
        ("include: base\ntask: own\ntag: mine\n", {"own", "mine"}),
        ("include: itself.yaml\ntask: own\n", {"own"}),
        ("dataset_path: json\n", set()),
        ("", set()),
    ],
)
def test_names_in_a_file(tmp_path: Path, written: str, expected: set[str]) -> None:
    (tmp_path / "base").write_text("tag:\n  # a remark\n  - inherited\ngroup: not this\n", encoding="utf-8")
    (tmp_path / "itself.yaml").write_text(written, encoding="utf-8")
    assert names._names_in(tmp_path / "itself.yaml") == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("arc_easyy", "did you mean arc_easy?"),
        ("truthfulqa_mc3", "did you mean truthfulqa_mc"),
        ("no such task at all", "there is no task"),
        ("x" * 201, "at most 200 characters, found 201"),
        ("y" * 100_000, "at most 200 characters, found 100000"),
        ("a\0b", "control characters"),
        ("a\nb", "control characters"),
        ("a\x1b[31mb", "control characters"),
        ("a\u202eb", "control characters"),
        ("", "empty one"),
        ("../nowhere", "retrieval folder with corpus.jsonl, found no folder"),
        ("/" + "z" * 5000, "retrieval folder with corpus.jsonl, found no folder"),
    ],
)
def test_odd_names_are_refused_in_one_short_sentence(name: str, words: str) -> None:
    found = refused(name)
    assert words in found
    assert len(found) < 400
    assert found.isprintable()


def test_an_unknown_task_is_refused_before_the_harness_is_loaded() -> None:
    """In a process of its own: neither lm_eval nor transformers is imported to say so."""
    script = (
        "import sys\nfrom prunelens.errors import PrunelensError\nfrom prunelens.tasks.suite import parse_tasks\n"
        "try:\n    parse_tasks('lambada_opnai')\nexcept PrunelensError as error:\n    print(error)\n"
        "print([name for name in ('lm_eval', 'torch', 'transformers') if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "did you mean lambada_openai?" in found
    assert found.splitlines()[-1] == "[]"


# --------------------------------------------------------------------------- folders


def beir(path: Path) -> None:
    path.mkdir()
    (path / "corpus.jsonl").write_text("", encoding="utf-8")


def test_a_folder_of_the_name_of_a_task_does_not_block_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    beir(tmp_path / "arc_easy")
    beir(tmp_path / "core_facts")
    beir(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    for name in ("gsm8k", "arc_easy", "core_facts"):
        chosen = parse_tasks(name)
        assert chosen.harness == (name,)
        assert chosen.notes == [f"{name} is the task of that name, not the folder; ./{name} is the folder"]
    for name in ("./arc_easy", str(tmp_path / "arc_easy"), "mine", "./core_facts"):
        chosen = parse_tasks(name)
        assert chosen.retrieval == (name,)
        assert chosen.notes == []
    assert "retrieval folder with corpus.jsonl, found none in empty" in refused("empty")
    assert "retrieval folder with corpus.jsonl, found none in ./gsm8k" in refused("./gsm8k")
    assert not is_retrieval("a\0b")


def test_without_the_harness_names_cannot_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    names._harness_files.cache_clear()
    try:
        assert harness_names() == frozenset()
        assert parse_tasks("whatever").harness == ("whatever",)
        with pytest.raises(PrunelensError, match="core_choice"):
            parse_tasks("core_chioce")
    finally:
        names._harness_files.cache_clear()


@pytest.mark.parametrize("tasks", ["arc_easyy", "a\0b", "x" * 300, {"retrieval": ["gsm9k"]}])
def test_the_command_refuses_before_anything_opens(tasks: object) -> None:
    with pytest.raises(PrunelensError):
        check_evaluation(["drop-attention:1"], tasks, {})  # type: ignore[arg-type]
