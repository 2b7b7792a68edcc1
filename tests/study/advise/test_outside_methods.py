"""Methods from outside through the verbs: traced in what is stored, two versions never mixed, not needed again."""

import json
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import prunelens.cli.main
from conftest import text_model, text_network, text_tokenizer
from prunelens.api import compare, sweep
from prunelens.errors import PrunelensError
from prunelens.models.opening.loading import load
from prunelens.progress import silent
from prunelens.pruning import methods
from prunelens.pruning.apply import apply
from prunelens.pruning.calibration import read_calibration
from prunelens.pruning.plugins import check_loadable, load_again, load_plugin
from prunelens.pruning.pruned import Calibration
from prunelens.pruning.recipe import parse_recipe
from prunelens.report.pages.rerender import render_again
from prunelens.results import Comparison
from prunelens.study.advise import advise as advising
from prunelens.study.advise.answers import AnswerCache
from prunelens.study.advise.goal import Goal, Trial
from prunelens.study.advise.outside import methods_tried, rank, try_rankings
from prunelens.study.advise.search import Search
from prunelens.study.evaluate.measure import TaskRunner, TaskSettings
from prunelens.study.sweep.study_file import cells_of, parse_study
from prunelens.study.sweep.tables import is_mask
from prunelens.tasks.suite import parse_tasks

QUICK = {"num_prompts": 2, "max_new_tokens": 4}
TEXT = "Some text that calibrates, and a little more of it.\n"
MASK = "import prunelens\n\n\n@prunelens.mask('mine')\ndef mine(weight, inputs):\n    return {}\n"
SIZES = "weight.abs() * inputs.squares.sqrt().float()"
RANKING = "@prunelens.ranking('deepest')\ndef deepest(part):\n    return part.before[:, 0] * 0 + part.layer_idx\n"
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it; it works in a folder of its own."""
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    before = methods.snapshot()
    yield
    methods.restore(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that reads any text."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    text_network().save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MASK.format(SIZES) + RANKING, encoding="utf-8")
    (tmp_path / "texts.txt").write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Cli:
    """Run the command line, with nothing from outside registered before: (exit code, stdout, stderr)."""
    own = {key: method for key, method in methods.snapshot().items() if method.source is None}

    def run(*argv: str) -> tuple[int, str, str]:
        methods.restore(own)
        monkeypatch.setattr(sys, "argv", ["prunelens", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            prunelens.cli.main.main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run


def records(path: Path) -> list[dict[str, Any]]:
    digest = sha256(path.read_bytes()).hexdigest()
    return [
        {"name": name, "kind": kind, "file": path.name, "sha256": digest}
        for kind, name in (("ranking", "deepest"), ("mask", "mine"))
    ]


def forget() -> None:
    methods.restore({key: method for key, method in methods.snapshot().items() if method.source is None})


# --- prune ------------------------------------------------------------------------------------------------


def test_a_checkpoint_opens_without_the_plugin(tiny: Path, plugin: Path, tmp_path: Path, cli: Cli) -> None:
    recipe = "drop-mlp:1,by=deepest+mine:0.5"
    code, out, err = cli("prune", tiny, recipe, "-o", "out", "--plugin", plugin, "--calibration", "texts.txt", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["recipe"] == recipe
    record = json.loads((tmp_path / "out" / "config.json").read_text())["prunelens"]
    assert record["recipe"] == recipe
    assert record["methods"] == records(plugin)
    assert record["dropped"]["mlp"] == [3]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"The mask mine is from mine.py (sha256 `{records(plugin)[0]['sha256'][:16]}`)" in card

    model = load(tiny)
    expected = apply(parse_recipe(recipe), model, Calibration(read_calibration(Path("texts.txt"), model)))
    forget()
    found = load("out")
    ids = torch.tensor([found.tokenizer("A prompt")["input_ids"]])
    with expected.variant.running() as pruned, torch.inference_mode():
        assert torch.equal(found.network(ids).logits, pruned.network(ids).logits)
        more = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        own, other = (one.network.generate(ids, **more) for one in (found, pruned))
    assert torch.equal(own.sequences, other.sequences)
    assert all(torch.equal(left, right) for left, right in zip(own.logits, other.logits, strict=True))
    compare(str(tiny), "out", max_new_tokens=2, prompts=_prompts(tmp_path))


def _prompts(folder: Path) -> str:
    path = folder / "prompts.txt"
    path.write_text("One prompt\nAnother prompt\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "weight.nothing",
            "the mask mine failed in {}, line 6: AttributeError: 'Tensor' object has no attribute 'no",
        ),
        (
            "weight[:1]",
            "expected the mask mine in {}, line 4 to return scores of the shape of the matrix, (32, 32), ",
        ),
        ("weight / 0", "expected the mask mine in {}, line 4 to return finite scores"),
    ],
)
def test_a_failing_method_is_one_sentence_and_leaves_nothing(
    body: str, said: str, tiny: Path, plugin: Path, tmp_path: Path, cli: Cli
) -> None:
    plugin.write_text(MASK.format(body), encoding="utf-8")
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    code, out, err = cli("prune", tiny, "mine:0.5", "-o", "out", "--plugin", plugin, "--calibration", "texts.txt")
    assert (code, out) == (2, "")
    assert err.startswith(f"prunelens: {said.format(plugin)}")
    assert len(err.splitlines()) == 1
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before


@pytest.mark.parametrize("command", ["compare", "evaluate", "prune", "benchmark", "advise", "sweep"])
def test_every_command_takes_plugins(command: str, tiny: Path, plugin: Path, cli: Cli) -> None:
    """A file that cannot be loaded is told of before anything else is looked at."""
    plugin.write_text("1 / 0\n", encoding="utf-8")
    arguments = {
        "advise": ("no-model", "--for", "retrieval"),
        "sweep": ("no-study.yaml",),
        "prune": ("no-model", "mine:0.5", "-o", "out"),
    }.get(command, ("no-model", "mine:0.5"))
    code, out, err = cli(command, *arguments, "--plugin", "mine.py")
    assert (code, out) == (2, "")
    assert err == f"prunelens: {plugin}, line 1: ZeroDivisionError: division by zero; nothing of this file is used\n"


def test_without_the_plugin_the_name_is_unknown(tiny: Path, cli: Cli) -> None:
    code, _, err = cli("prune", tiny, "mine:0.5", "-o", "out")
    assert code == 2
    assert "expected a recipe or a model, found 'mine:0.5'" in err
    code, _, err = cli("prune", tiny, "drop-mlp:1,by=deepest", "-o", "out")
    assert code == 2
    assert "there is no ranking 'deepest'; rankings: cosine" in err


# --- compare ----------------------------------------------------------------------------------------------


def test_a_run_says_what_made_it_and_opens_without(tiny: Path, plugin: Path, tmp_path: Path) -> None:
    load_plugin(plugin)
    recipe = "drop-mlp:1,by=deepest+mine:0.5"
    found = compare(str(tiny), recipe, "drop-mlp:1", prompts=_prompts(tmp_path), max_new_tokens=2)
    ours, built_in = found.info["compressed"]
    assert ours["methods"] == records(plugin)
    assert ours["dropped"] == {"mlp": [3]}
    assert "methods" not in built_in
    found.report(tmp_path / "run")
    forget()
    assert Comparison.open(tmp_path / "run").info["compressed"][0]["methods"] == records(plugin)
    assert recipe in render_again(tmp_path / "run")


def test_a_run_of_another_version_is_told(tiny: Path, plugin: Path, tmp_path: Path, cli: Cli) -> None:
    load_plugin(plugin)
    compare(str(tiny), "mine:0.5", prompts=_prompts(tmp_path), max_new_tokens=2).report(tmp_path / "run")
    made = ("prune", tiny, "mine:0.5", "--run", "run", "--plugin", plugin, "--calibration", "texts.txt")
    notes = []
    for name in ("same", "other"):
        assert cli(*made, "-o", name)[0] == 0
        notes.append("another version of a method" in (tmp_path / name / "README.md").read_text())
        plugin.write_text(MASK.format("weight.abs() + 0 * inputs.num_tokens"), encoding="utf-8")
    assert notes == [False, True]


# --- sweep ------------------------------------------------------------------------------------------------


def test_a_cell_is_named_by_the_version_of_its_methods(tiny: Path, plugin: Path) -> None:
    keys, recipes = [], [{"mine": [0.5]}, "drop-mlp:1,by=deepest", "wanda:0.5"]
    for body in (SIZES, "weight.abs() + 0 * inputs.num_tokens", SIZES):
        plugin.write_text(MASK.format(body) + RANKING, encoding="utf-8")
        load_plugin(plugin)
        document = {"model": str(tiny), "recipes": recipes, "tasks": None}
        keys.append([cell.key for cell in cells_of(parse_study(document), "fingerprint", "texts")])
    first, edited, again = keys
    assert first == again
    assert [left == right for left, right in zip(first, edited, strict=True)] == [False, False, True]


def test_workers_load_the_file_and_measure_an_edited_one_anew(
    tiny: Path, plugin: Path, tmp_path: Path, cli: Cli
) -> None:
    document = {"model": str(tiny), "recipes": ["mine:0.5", "wanda:0.5"], "tasks": None, "compare": QUICK}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    cells = []
    for body in (SIZES, "weight.abs() + 0 * inputs.num_tokens"):
        plugin.write_text(MASK.format(body), encoding="utf-8")
        code, out, err = cli("sweep", "study.yaml", "-o", "out", "--plugin", "mine.py", "--json")
        assert code == 0, err
        summary = json.loads(out)["summary"]
        assert [row["status"] for row in summary] == ["done", "done"], summary
        cells.append({row["recipe"]: row for row in summary})
    for recipe in ("mine:0.5", "wanda:0.5"):
        same = [row[recipe]["key"] for row in cells]
        assert (same[0] == same[1]) == (recipe == "wanda:0.5")
    assert cells[0]["mine:0.5"]["kl"] == cells[0]["wanda:0.5"]["kl"] != cells[1]["mine:0.5"]["kl"]
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [record["sha256"] for record in stored["methods"]] == [sha256(plugin.read_bytes()).hexdigest()]
    forget()
    assert "mine:0.5" in render_again(tmp_path / "out")


def test_workers_find_what_they_can(plugin: Path, tmp_path: Path) -> None:
    load_plugin(plugin)
    references = parse_recipe("mine:0.5+drop-mlp:1,by=deepest").references
    check_loadable(references)
    forget()
    load_again(references)
    assert parse_recipe("mine:0.5+drop-mlp:1,by=deepest").references == references
    forget()
    plugin.write_text(MASK.format("weight"), encoding="utf-8")
    with pytest.raises(PrunelensError, match=r"mine.py has changed since its method mine was loaded; start again"):
        load_again(references[:1])


def test_a_notebook_has_no_file_for_workers(tiny: Path, tmp_path: Path) -> None:
    exec(compile(MASK.format("weight"), "/tmp/ipykernel_7/1.py", "exec"), {"__name__": "__main__"})
    with pytest.raises(PrunelensError, match="expected the mask mine in a file, so that workers can load it"):
        sweep({"model": str(tiny), "recipes": ["mine:0.5"], "tasks": None, "compare": QUICK}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_study_cannot_name_a_plugin(tiny: Path, plugin: Path) -> None:
    with pytest.raises(PrunelensError, match="there is no key 'plugins'"):
        parse_study({"model": str(tiny), "recipes": ["wanda:0.5"], "plugins": [str(plugin)]})


def test_pages_take_an_unknown_mask_for_a_mask() -> None:
    assert [kind for kind in ("mine", "mine n:m", "wanda", "sparsegpt n:m") if not is_mask(kind)] == []
    others = ("drop-mlp", "drop-block + linear", "sum", "quantize", "drop-experts")
    assert [kind for kind in others if is_mask(kind)] == []


# --- advise -----------------------------------------------------------------------------------------------


@pytest.fixture
def search(tmp_path: Path) -> Search:
    """A search that has not begun, on a model that has only to be ranked."""
    model = text_model()
    runner = TaskRunner(model, parse_tasks({"long-generation": ["core_long"]}), TaskSettings(limit=2, subset="search"))
    texts = [[7, 30, 60, 90, 120], [40, 50]]
    return Search(
        model,
        runner,
        Goal("long-generation"),
        AnswerCache(tmp_path / "answers"),
        [],
        lambda: texts,
        {"of": "m"},
        silent,
    )


def judging(search: Search, monkeypatch: pytest.MonkeyPatch, keeps: Callable[[str], bool]) -> list[tuple[str, str]]:
    """Let this judge; (recipe, family) of what it is asked."""
    asked: list[tuple[str, str]] = []

    def judge(recipe: str, family: str, size: float) -> Trial:
        asked.append((recipe, family))
        return Trial(recipe, family, size, 0.0, 0.0, 0.0, 0.0, keeps(recipe), "")

    monkeypatch.setattr(search, "judge", judge)
    return asked


def test_advice_bisects_every_mask(plugin: Path, search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    load_plugin(plugin)
    asked = judging(search, monkeypatch, lambda recipe: float(recipe.partition(":")[2]) <= 0.3)
    search.masks()
    for mask, family in (("wanda", "masks"), ("mine", "masks by mine")):
        own = [recipe for recipe, found in asked if found == family]
        assert {f"{mask}:0.3", f"{mask}:0.35"} <= set(own)
        assert all(recipe.startswith(f"{mask}:") for recipe in own)


def test_advice_drops_in_the_order_of_a_ranking(plugin: Path, search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    load_plugin(plugin)
    asked = judging(search, monkeypatch, lambda recipe: recipe.count("a") - recipe.count("sublayers") < 3)
    try_rankings(search)
    assert {family for _, family in asked} == {"drops by deepest"}
    recipes = [recipe for recipe, _ in asked]
    assert recipes[:3] == ["drop-attention@3", "drop-sublayers@a3,m3", "drop-sublayers@a2,a3,m3"]
    assert all(parse_recipe(recipe).outside_methods == () for recipe in recipes)
    assert all(Trial(recipe, family, 1.0, 0.0, 0.0, 0.0, 0.0, True, "").is_drop for recipe, family in asked)


def test_answers_about_another_version_are_not_taken(plugin: Path, search: Search) -> None:
    questions = []
    for body in (SIZES, "weight.abs() + 0 * inputs.num_tokens"):
        plugin.write_text(MASK.format(body) + RANKING, encoding="utf-8")
        load_plugin(plugin)
        questions.append([search.about_recipe(recipe) for recipe in ("mine:0.5", "wanda:0.5")])
        rank(search, "deepest")
        rank(search)
    (first, plain), (second, same) = questions
    assert first["methods"] == records(plugin)[1:] or second["methods"] == records(plugin)[1:]
    assert first != second
    assert plain == same == {"of": "m", "recipe": "wanda:0.5"}
    assert len(list((search.answers.folder).glob("*.json"))) == 3  # the ranking of each version, and the cosine
    assert [record["name"] for record in methods_tried()["methods"]] == ["mine", "deepest"]
    forget()
    assert methods_tried() == {}


def test_advice_asks_for_rankings_between_drops_and_sums(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("formats", "masks", "drops", "together"):
        monkeypatch.setattr(search, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(advising, "try_rankings", lambda found: calls.append("rankings"))
    searching = advising._Advising.__new__(advising._Advising)
    searching.budget, searching.answers = None, search.answers
    searching._search(search)
    assert calls == ["formats", "masks", "drops", "rankings", "together"]
