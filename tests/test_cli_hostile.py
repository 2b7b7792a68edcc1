"""The command line on files that strangers wrote: one sentence, exit code 2, nothing left behind, at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import words
from prunelens.cli.options import print_json, slug
from prunelens.errors import PrunelensError
from prunelens.pruning.recipe import parse_recipe
from prunelens.study.candidates import open_candidates
from prunelens.study.compare.compare import check_inputs
from prunelens.study.evaluate.evaluate import check_evaluation
from test_cli import (  # noqa: F401  (fixtures)
    Cli,
    assert_says,
    cli,
    comparison,
    finished,
    refused,
    sentence,
    template,
    tree,
    work,
)

OPEN = "prunelens.models.opening.loading.load"
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be refused without a model is refused before one is opened."""
    monkeypatch.setattr(OPEN, lambda *args, **more: pytest.fail("a model was opened"))


# --- files ---------------------------------------------------------------------------------------------------

PROMPTS = [
    ('{"prompt": "w3", "optoins": ["w4", "w5"]}', ("prompts.jsonl:1", "'optoins'", "did you mean options?")),
    ('{"promt": "w3"}', ("'promt'", "did you mean prompt?")),
    ('{"prompt": "w3", "prompt": "w4"}', ("prompts.jsonl:1", "'prompt'", "twice")),
    (
        '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        ("prompts.jsonl:1", "'content'", "twice"),
    ),
    ('{"prompt": "w3", "options": ["w4", "w5"], "answer": "w6"}', ("one of the options", "'w6'")),
    ('{"prompt": "w3", "options": ["w4", "w5"], "answer": "A"}', ("one of the options", "'A'")),
    ('{"prompt": "w3", "options": ["w4", "w5"], "answer": 0}', ("one of the options", "'0'")),
    ('{"prompt": "w3", "options": ["w4", "w5"], "answer": ["w4"]}', ("answer", "a list")),
    ('{"prompt": "w3", "options": ["w4", "w4"]}', ("'w4'", "twice")),
    ('{"messages": [{"role": "user", "content": "w3", "name": "x"}]}', ("'name'", "role, content")),
    ('{"messages": [{"role": "usr", "content": "w3"}]}', ("'usr'", "did you mean user?")),
    ('{"prompt": "w3", "id": [1]}', ("id", "a list")),
    ('{"prompt": "w3", "id": true}', ("id", "true")),
    ('{"prompt": "w3", "kind": 3}', ("kind", "3")),
    ('{"prompt": "w3", "id": ' + "9" * 5_000 + "}", ("100 digits",)),
    ('{"prompt": ' + "[" * 200 + "]" * 200 + "}", ("50 deep",)),
    ("x" * 1_000_000, ("expected a JSON object", "xxx…xxx")),
    (b'{"prompt": "w3\x00"}', ("prompts.jsonl:1", "NUL")),
    ('{"prompt": "w3"}'.encode("utf-16"), ("UTF-16",)),
]


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize(("content", "parts"), PROMPTS)
def test_prompts_are_refused(cli: Cli, work: Path, content: str | bytes, parts: tuple[str, ...]) -> None:  # noqa: F811
    (work / "prompts.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    found = refused(cli, work, *comparison(prompts="prompts.jsonl"))
    assert_says(found, *parts)
    assert len(found) < 500


RECIPES = [
    ("steps: [{method: drop-mlp, count: 1, count: 2}]", ("recipe.yaml:1", "'count'", "twice")),
    ("steps: []\nsteps: [{method: drop-mlp, count: 1}]", ("recipe.yaml:1", "'steps'", "twice")),
    ("steps: [{method: drop-mlp, cuont: 1}]", ("steps.0", "'cuont'", "did you mean count?")),
    ("step: [{method: drop-mlp, count: 1}]", ("'step'", "did you mean steps?")),
    ("steps: [{method: drop-mpl, count: 1}]", ("steps.0", "'drop-mpl'", "did you mean drop-mlp?")),
    ("steps: [{method: drop-mlp, count: 2023-13-45}]", ("steps.0.count", "integer")),
    ("steps: [{method: drop-mlp, count: 012}]", ("steps.0.count", "integer")),
    ("steps: [{method: drop-mlp, count: '1'}]", ("steps.0.count", "integer")),
    ("steps: [{method: drop-experts, fraction: .nan}]", ("steps.0.fraction", "number")),
    ("steps: [{method: drop-block, count: 1, consecutive: 1}]", ("steps.0.consecutive", "boolean")),
    ("steps: [{method: drop-mlp, at: [true]}]", ("steps.0", "found true")),
    ("steps: [{method: wanda, sparsity: 124}]", ("steps.0.sparsity", "string")),
    ("steps: [{method: drop-mlp, count: " + "9" * 5_000 + "}]", ("100 digits",)),
    ("steps:\n" + "- {method: magnitude, sparsity: 0.5}\n" * 6_000, ("at most 64 steps, found 6000",)),
    ("steps:\n" + "- {method: magnitude, sparsity: 0.5}\n" * 60_000, ("at most 0.25 MiB",)),
    (LAUGHS, ("anchors",)),
    ("steps: &a [*a]", ("anchors",)),
    ("steps: !!python/object:os.system {}", ("tags",)),
    ("steps: " + "[" * 10_000, ("50 deep",)),
    ("steps: [{method: 3}]", ("steps.0", "no method 3")),
    ("steps: [{method: [a]}]", ("steps.0", "no method a list")),
]


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize(("content", "parts"), RECIPES)
def test_recipe_files_are_refused(cli: Cli, work: Path, content: str, parts: tuple[str, ...]) -> None:  # noqa: F811
    (work / "recipe.yaml").write_text(content, encoding="utf-8")
    for argv in (comparison("recipe.yaml"), ["prune", "model", "recipe.yaml", "-o", "out"]):
        found = refused(cli, work, *argv)
        assert_says(found, "recipe.yaml", *parts)
        assert len(found) < 700


STUDIES = [
    ("seeds: [0]\nseeds: [1]\n", ("bad.yaml:1", "'seeds'", "twice")),
    ("compare: {num_prompts: 1, num_prompts: 2}\n", ("bad.yaml:3", "'num_prompts'", "twice")),
    ("tasks: {retrieval: [core_retrieval], retrieval: [core_long]}\n", ("'retrieval'", "twice")),
    (f"seeds: [{10**30}]\n", ("a seed of at most 4294967295",)),
    (f"seeds: [{2**32}]\n", ("a seed of at most 4294967295",)),
    ("seeds: [true]\n", ("seeds.0", "integer", "true")),
    ("seeds: [1.0]\n", ("seeds.0", "integer", "1.0")),
    ("seeds: ['1']\n", ("seeds.0", "integer", "'1'")),
    ("compare: {temperature: .nan}\n", ("compare.temperature", "number")),
    ("compare: {temperature: '1'}\n", ("compare.temperature", "number")),
    ("compare: {temperature: -1}\n", ("temperature from 0.01 to 100",)),
    ("compare: {max_new_tokens: 1000000000000}\n", ("--max-new-tokens of at most 1000000",)),
    ("compare: {batch_size: 1e3}\n", ("compare.batch_size", "integer")),
    ("compare: {chat_template: 1}\n", ("compare.chat_template", "boolean")),
    ("evaluate: {limit: 3.0}\n", ("evaluate.limit", "integer")),
    ("thresholds: {safe: .inf}\n", ("thresholds.safe", "number")),
    ("thresholds: {safe: '0.9'}\n", ("thresholds.safe", "number")),
    ("thresholds: {safe: true}\n", ("thresholds.safe", "number")),
    ('calibration: "a\\0b"\n', ("calibration texts", "NUL")),
    ("tasks: {1: [core_long]}\n", ("text as a key", "'1'")),
    ("dtype: 16\n", ("dtype", "string", "16")),
    ("device: [cpu]\n", ("device", "string", "a list")),
    ("2024-01-01: x\n", ("no key '2024-01-01'",)),
    (LAUGHS, ("anchors",)),
]


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize(("more", "parts"), STUDIES)
def test_studies_are_refused(cli: Cli, work: Path, more: str, parts: tuple[str, ...]) -> None:  # noqa: F811
    (work / "bad.yaml").write_text("model: model\nrecipes: [drop-mlp:1]\n" + more, encoding="utf-8")
    found = refused(cli, work, "sweep", "bad.yaml", "-o", "out")
    assert_says(found, "bad.yaml", *parts)


@pytest.mark.usefixtures("closed")
def test_no_command_waits_for_a_pipe_or_reads_a_device(cli: Cli, work: Path) -> None:  # noqa: F811
    for name in ("pipe", "pipe.jsonl", "pipe.yaml"):
        os.mkfifo(work / name)
    before = sorted(work.iterdir())
    for argv, said in (
        (comparison(prompts="pipe"), "found a pipe"),
        (comparison(prompts="pipe.jsonl"), "found a pipe"),
        (comparison(prompts="/dev/zero"), "found a device"),
        (comparison("pipe.yaml"), "found a pipe"),
        (["prune", "model", "pipe.yaml", "-o", "out"], "found a pipe"),
        (["sweep", "pipe.yaml", "-o", "out"], "found a pipe"),
    ):
        code, stdout, stderr = cli(*argv)
        assert (code, stdout) == (2, "")
        assert said in sentence(stderr)
    (work / "run.json").mkdir()
    assert_says(sentence(cli("report", work)[2]), "run.json", "a directory")
    (work / "run.json").rmdir()
    os.mkfifo(work / "run.json")
    assert_says(sentence(cli("report", work)[2]), "run.json", "a pipe")
    assert sorted(work.iterdir()) == sorted([*before, work / "run.json"])


def test_calibration_of_a_pipe_or_with_a_lying_header(cli: Cli, work: Path) -> None:  # noqa: F811
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000, 1000000)}\n"
    (work / "lies.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    (work / "double.jsonl").write_text('{"text": "w3", "text": "w4"}\n', encoding="utf-8")
    np.savez(work / "a.npz", np.ones((1, 2), int))
    (work / "a.npz").rename(work / "archive.npy")
    for name, said in (
        ("lies.npy", "8000000000000000 bytes"),
        ("double.jsonl", "'text' is given twice"),
        ("archive.npy", "an archive"),
        ("/dev/zero", "a device"),
    ):
        assert_says(refused(cli, work, *comparison(), "--calibration", name), said)


# --- settings ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize(
    "argv",
    [
        [*comparison(), "--seed", str(10**30)],
        ["evaluate", "model", "drop-mlp:1", "--seed", str(2**64)],
        ["advise", "model", "--for", "retrieval", "--keep", "nan"],
        ["advise", "model", "--for", "retrieval", "--budget", "nan"],
        ["advise", "model", "--for", "retrieval", "--budget", "inf"],
        ["advise", "model", "--for", "retrieval", "--budget", "-1"],
        [*comparison(), "--temperature", "nan"],
        [*comparison(), "--temperature", "inf"],
        [*comparison(), "--max-new-tokens", str(10**12)],
        [*comparison(), "--batch-size", str(10**30)],
        [*comparison(), "--lens-steps", str(10**30)],
        [*comparison(), "--num-prompts", "0"],
        ["benchmark", "model", "drop-mlp:1", "--context", str(10**30)],
        ["benchmark", "model", "drop-mlp:1", "--repeats", "1"],
        ["sweep", "none.yaml", "--workers", "-1"],
    ],
)
def test_numbers_without_meaning_are_refused(cli: Cli, work: Path, argv: list[str]) -> None:  # noqa: F811
    refused(cli, work, *argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["prune", "model", "drop-mlp:1", "-o", "out", "--seed", str(10**30)],
        ["advise", "model", "--for", "retrieval", "-o", "out", "--seed", str(10**30)],
    ],
)
def test_a_huge_seed_is_refused_everywhere(cli: Cli, work: Path, argv: list[str]) -> None:  # noqa: F811
    assert_says(refused(cli, work, *argv), "a seed of at most 4294967295")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_token": 8}, r"no setting 'max_new_token' \(did you mean max_new_tokens\?\)"),
        ({"prompt": "x"}, r"did you mean prompts\?"),
        ({"zzz": 1}, "no setting 'zzz'; settings: max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens: .*integer, found true"),
        ({"max_new_tokens": 8.0}, "max_new_tokens: .*integer, found 8.0"),
        ({"seed": "0"}, "seed: .*integer, found '0'"),
        ({"temperature": "1"}, "temperature: .*number, found '1'"),
        ({"temperature": True}, "temperature: .*number, found true"),
        ({"temperature": float("nan")}, "temperature from 0.01 to 100, found nan"),
        ({"chat_template": 1}, "chat_template: .*boolean, found 1"),
        ({"lens": "norm"}, r"found 'norm' \(did you mean normed\?\)"),
        ({"noise_dtype": "float8"}, "--noise-dtype"),
        ({"attribute": [1]}, "attribute"),
    ],
)
def test_settings_of_python_are_checked(settings: dict[str, object], said: str) -> None:
    with pytest.raises(PrunelensError, match=said):
        check_inputs(["drop-mlp:1"], settings)


def test_settings_of_tasks_are_checked() -> None:
    for settings, said in (
        ({"limt": 3}, r"did you mean limit\?"),
        ({"limit": "3"}, "limit: .*found '3'"),
        ({"threshold": 3}, r"did you mean thresholds\?"),
        ({"seed": 2**40}, "at most 4294967295"),
        ({"long_tokens": 10**12}, "at most 1000000"),
    ):
        with pytest.raises(PrunelensError, match=said):
            check_evaluation(["drop-mlp:1"], "core_long", settings)


def test_a_path_and_a_list_are_taken_as_text_and_labels(tmp_path: Path) -> None:
    found = check_inputs(["drop-mlp:1"], {"calibration": tmp_path, "attribute": ["drop-mlp:1"], "temperature": 1})
    assert found.calibration == str(tmp_path)
    assert found.attribute == ("drop-mlp:1",)
    json.dumps(vars(found))


# --- nothing left to run -------------------------------------------------------------------------------------

EMPTY = (
    "drop-block:4",
    "drop-block:4,consecutive",
    "drop-block:4,iterative".replace(",iterative", ""),
    "drop-block@0,1,2,3",
    "drop-attention:4+drop-mlp:4",
    "drop-attention@0,1,2,3+drop-mlp:4",
    "drop-sublayers:8",
    "drop-sublayers:8,iterative",
    "drop-sublayers@a0,a1,a2,a3,m0,m1,m2,m3",
    "drop-block:2+drop-sublayers:4",
    "drop-attention:4+drop-mlp:4+repair:linear",
    "drop-block@0,1+drop-block:2",
)


@pytest.mark.parametrize("recipe", EMPTY)
def test_no_recipe_may_leave_nothing(cli: Cli, work: Path, recipe: str) -> None:  # noqa: F811
    for argv in (
        comparison(recipe),
        ["prune", "model", recipe, "-o", "out"],
        ["benchmark", "model", recipe, "--context", "4", "--new-tokens", "1"],
        ["evaluate", "model", recipe, "--tasks", "core_long", "-o", "out"],
    ):
        assert_says(refused(cli, work, *argv), "takes out every attention and MLP", "leave at least one")


def test_one_sublayer_is_enough() -> None:
    from conftest import tiny_model

    for recipe in ("drop-block:3", "drop-attention:4+drop-mlp:3", "drop-sublayers:7", "drop-block:3+drop-mlp:1"):
        assert str(open_candidates(tiny_model(), [recipe])[0].recipe) == recipe


# --- sentences and names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["\x1b[2Jx", "a\nb", "a\u202eb", "a\u200bb", "a\x9bb", "a\u2028b", "[red]x[/red]", "a\rb"]
)
def test_no_name_steers_the_terminal(cli: Cli, work: Path, name: str) -> None:  # noqa: F811
    for argv in (
        comparison(dense=f"./{name}"),
        comparison(f"drop-{name}:1"),
        comparison(prompts=name),
        ["report", name],
        ["sweep", name],
        ["evaluate", "model", "drop-mlp:1", "--tasks", f"core_{name}"],
    ):
        found = sentence(cli(*argv)[2]) if "./" not in " ".join(argv) else ""
        assert not set(found) & set("\x1b\n\u202e\u200b\x9b\u2028\r")


def test_the_way_to_the_page_is_printable(cli: Cli, work: Path) -> None:  # noqa: F811
    name = "out\x1b[31m\u202e\n[red]"
    argv = [item for item in comparison(output=name) if item != "--json"]
    code, stdout, _ = cli(*argv)
    assert code == 0
    assert not set(stdout) & set("\x1b\u202e")
    assert (work / name / "report.html").is_file()
    code, stdout, _ = cli("report", name)
    assert code == 0
    assert not set(stdout) & set("\x1b\u202e")


def test_markup_in_a_prompt_stays_text(cli: Cli, work: Path) -> None:  # noqa: F811
    (work / "p.jsonl").write_text(json.dumps({"prompt": words(3, 4), "id": "[red]"}), encoding="utf-8")
    (work / "[bold]x").symlink_to(work / "model")
    argv = [item for item in comparison("drop-mlp:1", prompts="p.jsonl", dense="./[bold]x") if item != "--json"]
    code, stdout, _ = cli(*argv)
    assert code == 0
    assert "[bold]x" in stdout


def test_a_long_name_is_cut_in_the_sentence(cli: Cli, work: Path) -> None:  # noqa: F811
    long = "x" * 100_000
    for argv in (
        comparison(f"drop-mlp@{long}"),
        comparison(prompts=long),
        ["evaluate", "model", "drop-mlp:1", "--tasks", f"core_{long}"],
        ["prune", "model", f"{long}:1", "-o", "out"],
        ["report", long],
    ):
        assert len(refused(cli, work, *argv)) <= 1_000


@pytest.mark.parametrize("name", ["x" * 300, "漢" * 300, "..", ".", "", "a/b\x1b:*?", "\ud800", "...yaml"])
def test_a_slug_is_a_short_name_of_a_file(tmp_path: Path, name: str) -> None:
    found = slug(name)
    assert 0 < len(found.encode()) <= 60
    assert found not in (".", "..")
    (tmp_path / f"20260101-000000-{found}-tasks").mkdir()


@pytest.mark.parametrize("setting", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_without_the_characters_is_no_fault(work: Path, setting: dict[str, str]) -> None:  # noqa: F811
    printing = "from prunelens.report.terminal.screen import console; say('\\xdf'); console().print('\\xbd')"
    for code in (
        "import sys, prunelens.cli.main as cli; sys.argv = ['prunelens', 'compare', '--help']; cli.main()",
        f"from prunelens.cli.options import say, take_any_encoding; take_any_encoding(); {printing}",
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=work, env=os.environ | setting, capture_output=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout


def test_json_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"name": "\x1b[2J größe \u202e \x7f \ud800"}
    print_json(answer)
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert printed.strip().isprintable()
    assert json.loads(printed) == answer


def test_a_recipe_may_not_hide_in_a_path_with_nul() -> None:
    with pytest.raises(PrunelensError):
        parse_recipe("a\0b")
    with pytest.raises(PrunelensError, match="NUL"):
        parse_recipe("a\0b.yaml")


def test_no_result_goes_to_a_path_with_nul() -> None:
    from prunelens.api import sweep
    from prunelens.study.compare.schemas import RUN

    with pytest.raises(PrunelensError, match="the path of the output, found a NUL"):
        RUN.probe_target(Path("a\0b"))
    with pytest.raises(PrunelensError, match="the path of the sweep, found a NUL"):
        sweep({"model": "m", "recipes": ["drop-mlp:1"]}, "a\0b")
