"""Sweeps: cells survive whatever happens to workers, are made once, and say the same as what they are made of."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from html.parser import HTMLParser
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import scipy.stats

from conftest import text_network, text_tokenizer
from prunelens.api import evaluate, sweep
from prunelens.errors import PrunelensError
from prunelens.pruning.recipe import parse_recipe
from prunelens.pruning.steps.drop import DROPS
from prunelens.pruning.steps.mask import MASKS
from prunelens.report.pages.rerender import render_again
from prunelens.report.pages.sweep import render_sweep
from prunelens.results import Sweep
from prunelens.study.compare.schemas import RUN
from prunelens.study.evaluate.words import BROKEN, DEGRADED, NOT_MEASURED, SAFE, UNDECIDED
from prunelens.study.forecast import read_forecast
from prunelens.study.store import Run, read_run, write_run
from prunelens.study.sweep.cells import CELL
from prunelens.study.sweep.executors import EXECUTORS, Outcome, run_local
from prunelens.study.sweep.forecasts import PREDICTIONS, alike, calibration, fit_forecast, use_loss
from prunelens.study.sweep.study_file import Cell
from prunelens.study.sweep.sweep import SWEEP
from prunelens.study.sweep.tables import CELL_NUMBERS, SCHEMAS, _kind, is_drop, is_mask
from prunelens.tasks.suite import USES, suite_folder

PATIENCE = 120.0
"""Seconds after which a wait for another process is a failure."""
KILLS = 10
QUICK = {"num_prompts": 2, "max_new_tokens": 4}
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)<\u2044script>{{7*7}}<b>&amp;"
CONTEXT = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    """Processes are forked with all that a sweep imports, whatever they were forked with in other tests."""
    forkserver._forkserver._stop()
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here, here.parent))), prepend=os.pathsep)
        CONTEXT.set_forkserver_preload(["prunelens.study.sweep.sweep", __name__])
        forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that reads any text."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    text_network().save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(recipe, seed) of the cells that workers were asked for, all runs together."""
    found: list[tuple[str, int]] = []

    def run(jobs: list[Cell], *rest: Any) -> Iterator[Outcome]:
        found.extend((cell.recipe, cell.seed) for cell in jobs)
        return run_local(jobs, *rest)

    monkeypatch.setitem(EXECUTORS, "local", run)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells that workers would have been asked for; no worker starts."""
    found: list[Cell] = []

    def run(jobs: list[Cell], *rest: Any) -> Iterator[Outcome]:
        found.extend(jobs)
        return iter(())

    for name in EXECUTORS:
        monkeypatch.setitem(EXECUTORS, name, run)
    return found


def study(model: Path, *recipes: str, **changed: Any) -> dict[str, Any]:
    return {"model": str(model), "recipes": list(recipes), "tasks": None, "compare": QUICK} | changed


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def cells_in(folder: Path) -> list[Path]:
    """Cells that are there, whole."""
    return sorted((folder / "cells").glob(f"[!.]*/{CELL}"))


def assert_same(found: Sweep, expected: Sweep) -> None:
    assert list(found.tables) == list(expected.tables) == ["cells", "scores", "verdicts"]
    for name, table in expected.tables.items():
        assert found.tables[name].equals(table), name
    for name in ("summary", "calibration", "alike"):
        assert found.info[name] == expected.info[name]


def assert_whole(found: Sweep, num_cells: int) -> None:
    """Every cell is there and can be read, and nothing else is."""
    keys = found.tables["cells"]["key"].to_pylist()
    assert len(set(keys)) == num_cells
    assert sorted(path.name for path in (found.folder / "cells").iterdir()) == sorted(keys)
    for key, recipe in zip(keys, found.tables["cells"]["recipe"].to_pylist(), strict=True):
        home = found.folder / "cells" / key
        assert {path.name for path in home.iterdir()} == {CELL, "compare"}
        record = json.loads((home / CELL).read_text(encoding="utf-8"))
        assert (record["key"], record["recipe"]) == (key, recipe)
        assert read_run(home / "compare", RUN).info["summary"][0]["compressed"] == recipe
    shown = {path.name for path in found.folder.iterdir() if not path.name.startswith(".")}
    assert shown == {"study.json", "cells", "run.json", "report.html", *(f"{name}.parquet" for name in SCHEMAS)}


# --------------------------------------------------------------------------- killed


def run_alone(document: dict[str, Any], folder: Path) -> None:
    """A sweep in a session of its own, so that all its processes can be killed at once."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sweep(document, folder)


def session(leader: int) -> list[psutil.Process]:
    """The living processes of a session."""
    found = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def start_alone(document: dict[str, Any], folder: Path) -> Any:
    process = CONTEXT.Process(target=run_alone, args=(document, folder))
    process.start()
    wait_until(lambda: session(process.pid) or not process.is_alive())
    return process


def run_to_end(document: dict[str, Any], folder: Path) -> float:
    """Run a sweep undisturbed; seconds until there was a cell."""
    process, start = start_alone(document, folder), time.monotonic()
    wait_until(lambda: cells_in(folder) or not process.is_alive())
    seconds = time.monotonic() - start
    process.join()
    assert process.exitcode == 0
    return seconds


def kill(document: dict[str, Any], folder: Path, seconds: float) -> None:
    """Kill a sweep after so many seconds, or at its next cell if that comes first."""
    before = len(cells_in(folder))
    process = start_alone(document, folder)
    moment = time.monotonic() + seconds
    while time.monotonic() < moment and process.is_alive() and len(cells_in(folder)) == before:
        time.sleep(0.001)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    wait_until(lambda: not session(process.pid))
    assert process.exitcode == -signal.SIGKILL


def test_a_sweep_killed_ten_times_ends_as_if_it_was_not(tiny: Path, tmp_path: Path) -> None:
    drops = [f"drop-{part}@{layer}" for part in ("attention", "mlp", "block") for layer in range(4)]
    shares = [f"magnitude:0.{share:02d}" for share in range(5, 95, 5)]
    recipes = [*drops, *shares, "wanda:0.5", "drop-mlp:1", "magnitude:2:4"]
    document, folder = study(tiny, *recipes), tmp_path / "killed"
    first = run_to_end(document, tmp_path / "calm")
    draw, seen = random.Random(0), []
    for _ in range(KILLS):
        kill(document, folder, draw.uniform(0, 2 * first))
        seen.append(len(cells_in(folder)))
    assert seen == sorted(seen)
    assert seen[-1] < len(recipes)
    if not seen[-1]:  # a slow machine: no kill fell behind a cell
        kill(document, folder, 600)
    kept = {path: path.stat().st_mtime_ns for path in cells_in(folder)}
    assert kept
    run_to_end(document, folder)
    found, calm = Sweep.open(folder), Sweep.open(tmp_path / "calm")
    assert_same(found, calm)
    assert found.info == calm.info
    assert found.page.read_bytes() == calm.page.read_bytes()
    assert found.info["cells"] == {"done": len(recipes), "all": len(recipes)}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert_whole(found, len(recipes))
    assert_whole(calm, len(recipes))


def test_what_a_killed_worker_left_is_removed(tiny: Path, tmp_path: Path, asked: list[Cell]) -> None:
    left = tmp_path / "sweep" / "cells" / ".0123456789abcdef.x"
    (left / "compare").mkdir(parents=True)
    (left / "compare" / "run.json").write_text("{", encoding="utf-8")
    (tmp_path / "sweep" / "study.json").write_text("{}", encoding="utf-8")
    (tmp_path / "sweep" / ".mine").write_text("", encoding="utf-8")
    sweep(study(tiny, "drop-mlp@1"), tmp_path / "sweep")
    assert list((tmp_path / "sweep" / "cells").iterdir()) == []
    assert (tmp_path / "sweep" / ".mine").is_file()
    assert len(asked) == 1


def test_on_ray_a_lost_actor_loses_nothing(tiny: Path, tmp_path: Path) -> None:
    document = study(tiny, *(f"drop-mlp@{layer}" for layer in range(4)), compare={"num_prompts": 8})
    folder = tmp_path / "ray"
    cells_then: list[int] = []

    def kill_once() -> None:
        """Note how many cells there were then."""
        wait_until(actors)
        (actor,) = actors()
        wait_until(lambda: cells_in(folder))
        actor.kill()
        psutil.wait_procs([actor], PATIENCE)
        cells_then.append(len(cells_in(folder)))

    killer = threading.Thread(target=kill_once)
    killer.start()
    found = sweep(document, folder, executor="ray", workers=1)
    killer.join()
    assert 1 <= cells_then[0] < 4
    assert found.info["cells"] == {"done": 4, "all": 4}
    assert_same(found, sweep(document, tmp_path / "local"))
    assert_whole(found, 4)


def actors() -> list[psutil.Process]:
    """Ray's actors among what this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::Worker"):
                found.append(process)
    return found


# --------------------------------------------------------------------------- failed, resumed


def test_a_failed_cell_is_kept_and_only_it_is_tried_again(
    tiny: Path, tmp_path: Path, made: list[tuple[str, int]]
) -> None:
    document, folder = study(tiny, "drop-mlp@1", "drop-attention@99", "magnitude:0.5"), tmp_path / "sweep"
    first = sweep(document, folder)
    assert [recipe for recipe, _ in made] == document["recipes"]
    statuses = dict(zip(*(first.tables["cells"][name].to_pylist() for name in ("recipe", "status")), strict=True))
    assert statuses == {"drop-mlp@1": "done", "drop-attention@99": "failed", "magnitude:0.5": "done"}
    (failed,) = first.failed
    assert "99" in failed["error"]
    assert "\n" not in failed["error"]
    assert [failed[name] for name in CELL_NUMBERS] == [None] * len(CELL_NUMBERS)
    assert first.info["cells"] == {"done": 2, "all": 3}
    record = json.loads((folder / "cells" / failed["key"] / CELL).read_text(encoding="utf-8"))
    assert record["error"] == failed["error"]
    assert record["traceback"].startswith("Traceback")
    assert failed["key"] not in first.tables["verdicts"]["key"].to_pylist()
    assert "drop-attention@99" in first.page.read_text(encoding="utf-8")

    times = {path.parent.name: path.stat().st_mtime_ns for path in cells_in(folder)}
    made.clear()
    assert_same(sweep(document, folder), first)
    assert made == []
    assert {path.parent.name: path.stat().st_mtime_ns for path in cells_in(folder)} == times

    assert_same(sweep(document, folder, retry_failed=True), first)
    assert made == [("drop-attention@99", 0)]
    after = {path.parent.name: path.stat().st_mtime_ns for path in cells_in(folder)}
    assert {key for key in times if after[key] != times[key]} == {failed["key"]}


def test_only_what_is_new_is_made(tiny: Path, tmp_path: Path, made: list[tuple[str, int]]) -> None:
    recipes, folder = ["drop-mlp@1", "drop-attention:1"], tmp_path / "sweep"
    first = sweep(study(tiny, *recipes), folder)
    assert made == [(recipe, 0) for recipe in recipes]
    for changed, expected in (
        ({}, []),
        ({"recipes": [*recipes, "magnitude:0.5"]}, [("magnitude:0.5", 0)]),
        ({"seeds": [0, 3]}, [(recipe, 3) for recipe in recipes]),
        ({"compare": QUICK | {"num_prompts": 3}}, [(recipe, 0) for recipe in recipes]),
        ({"compare": QUICK | {"num_prompts": 3}, "seeds": [3]}, [(recipe, 3) for recipe in recipes]),
        ({"recipes": ["magnitude:.50", "drop-attention:1"], "seeds": [0]}, []),
    ):
        made.clear()
        found = sweep(study(tiny, *recipes) | changed, folder)
        assert made == expected, changed
        num_cells = len(changed.get("recipes", recipes)) * len(changed.get("seeds", [0]))
        assert found.info["cells"] == {"done": num_cells, "all": num_cells}
    assert_same(sweep(study(tiny, *recipes), folder), first)
    assert len(cells_in(folder)) == 9


def test_another_threshold_judges_what_is_there(tiny: Path, tmp_path: Path, made: list[tuple[str, int]]) -> None:
    asked = {"limit": 4, "long_tokens": 12, "all_items": True}
    tasks = {"tasks": ["core_long"], "compare": None, "evaluate": asked}
    document = study(tiny, "drop-mlp@1", "magnitude:0.3", **tasks)
    strict = sweep(document | {"thresholds": {"safe_nll": 0.001, "broken_nll": 0.002}}, tmp_path / "sweep")
    lenient = {"safe": 0.0001, "broken": 0, "safe_nll": 98, "broken_nll": 99}
    lax = sweep(document | {"thresholds": lenient}, tmp_path / "other")
    made.clear()
    again = sweep(document | {"thresholds": lenient}, tmp_path / "sweep")
    assert made == []
    assert_same(again, lax)
    assert again.tables["cells"].equals(strict.tables["cells"])
    use = "long-generation"
    rows = [[row for row in found.tables["verdicts"].to_pylist() if row["use"] == use] for found in (strict, again)]
    for before, after in zip(*rows, strict=True):
        assert before["rule"] != after["rule"]
        assert before["verdict"] in (BROKEN, DEGRADED, UNDECIDED)
        assert after["verdict"] in (SAFE, UNDECIDED)  # a share of few items is at best undecided


def test_a_class_that_ended_early_keeps_its_verdict(tiny: Path, tmp_path: Path) -> None:
    asked = {"limit": 64, "long_tokens": 4}
    document = study(tiny, "magnitude:0.99", tasks=["core_long"], compare=None, evaluate=asked)
    found = sweep(document, tmp_path / "sweep")
    (line,) = [one for one in found.info["summary"][0]["verdicts"] if one["use"] == "long-generation"]
    assert (line["stopped_early"], line["there"]) == (True, 64)
    scores = {row["metric"]: row for row in found.tables["scores"].to_pylist()}
    assert scores["atypical"]["items"] == line["used"] < 64
    whole = sweep(document | {"evaluate": asked | {"all_items": True}}, tmp_path / "sweep")
    assert {row["items"] for row in whole.tables["scores"].to_pylist() if row["metric"] == "atypical"} == {64}


def test_another_limit_asks_the_tasks_again(tiny: Path, tmp_path: Path, made: list[tuple[str, int]]) -> None:
    document = study(tiny, "drop-mlp@1", tasks=["core_long"], compare=None, evaluate={"limit": 2, "long_tokens": 4})
    for limit, expected in ((2, 1), (3, 1), (2, 0)):
        made.clear()
        found = sweep(document | {"evaluate": {"limit": limit, "long_tokens": 4}}, tmp_path / "sweep")
        assert len(made) == expected
        assert set(found.tables["scores"]["items"].to_pylist()) == {limit}
    assert len(cells_in(tmp_path / "sweep")) == 2


def test_a_class_given_anew_shows_in_the_verdicts(tiny: Path, tmp_path: Path) -> None:
    for use in ("long-generation", "retrieval"):
        document = study(tiny, "drop-mlp@1", compare=None, tasks={use: ["core_long"]}, evaluate={"limit": 2})
        found = sweep(document | {"evaluate": {"limit": 2, "long_tokens": 4}}, tmp_path / "sweep")
        assert set(found.tables["scores"]["use"].to_pylist()) == {use}
        verdicts = {row["use"]: row["verdict"] for row in found.tables["verdicts"].to_pylist()}
        assert {other for other in USES if verdicts[other] != NOT_MEASURED} == {use}


def test_other_retrieval_data_under_the_same_name_are_other_cells(
    tiny: Path, tmp_path: Path, asked: list[Cell]
) -> None:
    document = study(tiny, "drop-mlp@1", tasks=[str(write_beir(tmp_path / "beir"))])
    sweep(document, tmp_path / "sweep")
    sweep(document, tmp_path / "sweep")
    (tmp_path / "beir" / "queries.jsonl").write_text('{"_id": "q", "text": "another"}\n', encoding="utf-8")
    sweep(document, tmp_path / "sweep")
    first, second, third = (cell.key for cell in asked)
    assert first == second != third


# --------------------------------------------------------------------------- from anywhere, refused


def test_workers_find_what_a_relative_path_names(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").symlink_to(tiny)
    (tmp_path / "texts.txt").write_text("one text\nand another one\n", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("What?\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    document = study(Path("model"), "wanda:0.5", "drop-mlp:1", calibration="texts.txt")
    found = sweep(document | {"compare": QUICK | {"prompts": "prompts.txt"}}, "sweep")
    assert found.info["cells"] == {"done": 2, "all": 2}
    assert found.info["study"]["model"] == "model"
    assert_whole(found, 2)
    whole = study(tiny, "wanda:0.5", "drop-mlp:1", calibration=str(tmp_path / "texts.txt"))
    assert_same(sweep(whole | {"compare": QUICK | {"prompts": str(tmp_path / "prompts.txt")}}, "other"), found)


@pytest.mark.parametrize("comparing", [QUICK, None], ids=["compared", "asked"])
def test_no_repair_is_fitted_on_what_the_tasks_ask(tiny: Path, tmp_path: Path, comparing: Any) -> None:
    question = json.loads((suite_folder() / "core" / "core_facts.jsonl").read_text().splitlines()[4])["question"]
    found = []
    for name, lines in (("clean", ["one text"]), ("held", ["one text", f"Then: {question} Yes."])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": line}) for line in lines), encoding="utf-8")
        document = study(
            tiny, "drop-attention@1+repair:linear", calibration=str(path), tasks=["core_facts", "core_long"]
        )
        document |= {"compare": comparing, "evaluate": {"limit": 2, "long_tokens": 4}}
        found.append(sweep(document, tmp_path / name).tables["scores"].drop_columns("key"))
    assert found[0].equals(found[1])
    assert any(0 < row["compressed"] < 100 for row in found[0].to_pylist() if row["metric"] == "nll_dense")
    notes = [json.loads(path.read_text())["notes"] for path in (tmp_path / "held" / "cells").glob("*/*/run.json")]
    assert notes
    assert all(any("1 of 2 calibration texts hold" in note for note in each) for each in notes)


def test_built_in_prompts_stay_what_they_are_beside_a_file_of_their_name(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "core").write_text("a memory dump\n", encoding="utf-8")
    expected = sweep(study(tiny, "drop-mlp@1"), tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    assert_same(sweep(study(tiny, "drop-mlp@1"), tmp_path / "second"), expected)


def write_beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    passages = [json.dumps({"_id": f"p{row}", "text": f"passage {row}"}) for row in range(3)]
    (folder / "corpus.jsonl").write_text("\n".join(passages), encoding="utf-8")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "which one"}\n', encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text("q\tp1\t1\n", encoding="utf-8")
    return folder


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def refusal(document: Mapping[str, Any], folder: Path, **changed: Any) -> str:
    with pytest.raises(PrunelensError) as caught:
        sweep(document, folder, **changed)
    return str(caught.value)


def test_mistakes_are_found_before_any_worker_starts(tiny: Path, tmp_path: Path, asked: list[Cell]) -> None:
    good, folder = study(tiny, "drop-mlp@1"), tmp_path / "sweep"
    assert refusal(good, folder, executor="slurm") == "expected an executor of local, ray, found 'slurm'"
    assert refusal(good, folder, workers=0) == "expected --workers of at least 1, found 0"
    assert refusal(good, folder, executor="ray", workers=-1).startswith("expected --workers of at least 1, found -1")
    missing = tmp_path / "nowhere"
    assert str(missing) in refusal(study(missing, "drop-mlp@1"), folder)
    (tmp_path / "bare").mkdir()
    assert str(tmp_path / "bare") in refusal(study(tmp_path / "bare", "drop-mlp@1"), folder)
    message = refusal(good | {"calibration": str(missing)}, folder)
    assert message == f"expected calibration texts at {missing}: No such file or directory"
    assert str(missing) in refusal(good | {"compare": {"prompts": str(missing)}}, folder)
    assert "(did you mean core_choice?)" in refusal(good | {"tasks": ["core_choise"]}, folder)
    assert "(did you mean drop-attention?)" in refusal(good | {"recipes": ["drop-atention:1"]}, folder)
    assert "the study" in refusal({"model": str(tiny)}, folder)
    assert not folder.exists()
    assert asked == []


@pytest.mark.parametrize(
    ("damaged", "text"),
    [
        ("corpus.jsonl", "?"),
        ("queries.jsonl", "?"),
        ("qrels/test.tsv", "?"),
        ("queries.jsonl", ""),
        ("qrels/test.tsv", ""),
    ],
)
def test_damaged_retrieval_data(damaged: str, text: str, tiny: Path, tmp_path: Path, asked: list[Cell]) -> None:
    path = write_beir(tmp_path / "beir") / damaged
    path.write_text(text, encoding="utf-8") if text else path.unlink()
    message = refusal(study(tiny, "drop-mlp@1", tasks=[str(tmp_path / "beir")]), tmp_path / "sweep")
    assert str(path) in message
    assert not (tmp_path / "sweep").exists()
    assert asked == []


def test_a_task_without_its_data(
    tiny: Path, tmp_path: Path, asked: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    message = refusal(study(tiny, "drop-mlp@1", tasks=["arc_easy"]), tmp_path / "sweep")
    assert message.startswith("the data of the task arc_easy cannot be loaded (")
    assert message.endswith("; tasks other than core need the hub, or their data in the local cache")
    assert not (tmp_path / "sweep").exists()
    assert asked == []


@pytest.mark.parametrize("kind", ["files", "hidden file", "another result", "a file"])
def test_a_folder_that_holds_something_else(kind: str, tiny: Path, tmp_path: Path, asked: list[Cell]) -> None:
    folder = tmp_path / "home" / "mine"
    folder.parent.mkdir()
    if kind == "a file":
        folder.write_text("mine", encoding="utf-8")
    else:
        folder.mkdir()
        name = {"files": "notes.txt", "hidden file": ".notes", "another result": "run.json"}[kind]
        (folder / name).write_text('{"format": "prunelens-run"}', encoding="utf-8")
    before = content(folder.parent)
    message = refusal(study(tiny, "drop-mlp@1"), folder)
    assert message == f"{folder} exists and is not a sweep; choose another folder or remove it"
    assert content(folder.parent) == before
    assert asked == []


def test_an_empty_folder_becomes_a_sweep(tiny: Path, tmp_path: Path, asked: list[Cell]) -> None:
    found = sweep(study(tiny, "drop-mlp@1"), tmp_path)
    assert len(asked) == 1
    assert found.info["cells"] == {"done": 0, "all": 1}
    assert "No cell has finished" in found.page.read_text(encoding="utf-8")


# --------------------------------------------------------------------------- with tasks


def test_scores_and_verdicts_are_those_of_evaluate(tiny: Path, tmp_path: Path) -> None:
    recipes, tasks = ["drop-mlp@1", "drop-attention:1", "magnitude:0.7"], ["core_choice", "core_long"]
    settings = {"limit": 4, "long_tokens": 12}
    found = sweep(study(tiny, *recipes, tasks=tasks, compare=None, evaluate=settings), tmp_path / "sweep")
    direct = evaluate(str(tiny), *recipes, tasks=tasks, **settings)
    scores, verdicts = found.tables["scores"].to_pylist(), found.tables["verdicts"].to_pylist()
    assert [record["compressed"] for record in direct.summary] == recipes
    assert {row["recipe"] for row in scores} == set(recipes)
    assert len(scores) == sum(len(record["scores"]) for record in direct.summary)
    for record in direct.summary:
        own = [row for row in scores if row["recipe"] == record["compressed"]]
        assert {row["task"] for row in own} == set(tasks)
        for row, expected in zip(own, record["scores"], strict=True):
            plain = ("task", "metric", "use", "decides", "items", "chance", "at_chance", "tie", "lost", "gained")
            assert {name: row[name] for name in plain} == {name: expected[name] for name in plain}
            assert (row["dense"], row["compressed"]) == (expected["dense"]["mean"], expected["compressed"]["mean"])
            assert row["sign_test"] == expected["sign_test"]
            for name in ("difference", "kept"):
                values = [row[key] for key in (name, f"{name}_low", f"{name}_high")]
                interval = expected[name] or dict.fromkeys(("mean", "low", "high"))
                assert values == [interval[key] for key in ("mean", "low", "high")]
        lines = [row for row in verdicts if row["recipe"] == record["compressed"]]
        assert [line["use"] for line in lines] == list(USES)
        columns = [key for key in found.tables["verdicts"].column_names if key in record["verdicts"][0]]
        assert [[line[key] for key in columns] for line in lines] == [
            [line[key] for key in columns] for line in record["verdicts"]
        ]
    assert {row["verdict"] for row in verdicts if row["use"] == "long-generation"} != {NOT_MEASURED}
    assert found.info["calibration"] == []  # nothing was compared, so nothing was predicted


def test_the_class_that_a_study_gives_shows_in_the_verdicts(tiny: Path, tmp_path: Path) -> None:
    tasks = {"multiple-choice": ["core_facts"]}
    found = sweep(study(tiny, "drop-mlp@1", tasks=tasks, evaluate={"limit": 4}), tmp_path / "sweep")
    assert {(row["task"], row["use"]) for row in found.tables["scores"].to_pylist()} == {
        ("core_facts", "multiple-choice")
    }
    verdicts = {row["use"]: row for row in found.tables["verdicts"].to_pylist()}
    assert list(verdicts) == list(USES)
    assert "core_facts" in verdicts["multiple-choice"]["reason"] + verdicts["multiple-choice"]["number"]
    assert verdicts["short-generation"]["source"] != "measured"
    assert "core_facts" not in verdicts["short-generation"]["reason"]


# --------------------------------------------------------------------------- tables


def a_cell(key: str, **numbers: float) -> dict[str, Any]:
    recipe = numbers.pop("recipe", f"drop-mlp@{key}")
    about = {"key": key, "recipe": recipe, "seed": 0, "kind": "drop-mlp", "strength": key, "status": "done"}
    return about | {"error": None} | dict.fromkeys(CELL_NUMBERS) | numbers


def a_score(key: str, use: str, decides: str | None, dense: float, compressed: float, **more: Any) -> dict[str, Any]:
    names = {"key": key, "recipe": f"drop-mlp@{key}", "seed": 0, "task": use, "metric": str(decides), "items": 9}
    numbers = {"dense": dense, "compressed": compressed, "difference": compressed - dense, "chance": 0.0}
    blank = dict.fromkeys(field.name for field in SCHEMAS["scores"])
    return blank | names | numbers | {"use": use, "decides": decides, "at_chance": False, "tie": False} | more


def rows_of(cells: list[dict[str, Any]], scores: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {"cells": cells, "scores": scores, "verdicts": []}


def hand_made() -> dict[str, list[dict[str, Any]]]:
    """Cells whose predictions and losses are in another order, with a tie among them."""
    kl, choice, nll = [0.3, 0.1, 0.1, 2.0, 0.7], [0.5, 0.75, 0.5, 0.25, 0.5], [0.2, 0.05, 0.3, 1.5, 1.5]
    cells = [
        a_cell(str(row), kl=kl[row], same_choice=1 - kl[row] / 4, survival_8=0.9 - kl[row] / 3, zeros=0.1 * row)
        | {"excess_nll_predicted": kl[row] ** 2, "parameters_saved": 0.1 * row, "bytes_saved": 0.1 * row}
        for row in range(5)
    ]
    scores = []
    for row in range(5):
        scores += [
            a_score(str(row), "multiple-choice", "kept", 0.8, choice[row]),
            a_score(str(row), "multiple-choice", None, 0.8, 0.1),
            a_score(str(row), "long-generation", "nll", 2.0, 2.0 + nll[row]),
            a_score(str(row), "long-generation", "loops", 0.1, 0.6),
        ]
    return rows_of(cells, scores)


def test_calibration_is_the_rank_correlation_over_all_cells() -> None:
    rows = hand_made()
    found = {(item["use"], item["column"]): item for item in calibration(rows)}
    assert set(found) == {
        ("multiple-choice", "same_choice"),
        ("multiple-choice", "kl"),
        ("long-generation", "excess_nll_predicted"),
    }
    for use, column, name, turned in PREDICTIONS:
        if (use, column) not in found:
            continue
        item = found[use, column]
        predicted = [1 - cell[column] if turned else cell[column] for cell in rows["cells"]]
        measured = [use_loss(rows, cell["key"], use) for cell in rows["cells"]]
        assert item["rho"] == pytest.approx(scipy.stats.spearmanr(predicted, measured).statistic, abs=1e-12)
        assert (item["n"], item["name"]) == (5, name)
        assert -1 <= item["low"] < item["rho"] < item["high"] <= 1
        assert [point["predicted"] for point in item["points"]] == predicted
        assert [point["measured"] for point in item["points"]] == measured
        assert [point["recipe"] for point in item["points"]] == [cell["recipe"] for cell in rows["cells"]]
    assert found["multiple-choice", "kl"]["rho"] == pytest.approx(found["multiple-choice", "same_choice"]["rho"])
    assert 0 < abs(found["multiple-choice", "kl"]["rho"]) < 1


def test_seeds_of_a_recipe_count_once_and_agreed_tokens_are_turned_round() -> None:
    rows = hand_made()
    for place, cell in enumerate(rows["cells"]):
        cell["recipe"] = f"drop-mlp:{place // 2}"
        cell["expected_agreed"] = -float(cell["excess_nll_predicted"])
    found = {item["column"]: item for item in calibration(rows) if item["use"] == "long-generation"}
    item = found["excess_nll_predicted"]
    means = [
        [statistics.mean(point[side] for point in item["points"][start : start + 2]) for start in (0, 2, 4)]
        for side in ("predicted", "measured")
    ]
    assert item["rho"] == pytest.approx(scipy.stats.spearmanr(*means).statistic)
    assert (item["n"], len(item["points"]), item["low"], item["high"]) == (3, 5, -1, 1)
    assert found["expected_agreed"]["rho"] == pytest.approx(item["rho"])


def test_calibration_leaves_out_what_is_not_there() -> None:
    rows = hand_made()
    failed = {"key": "5", "recipe": "drop-mlp@5", "seed": 0, "status": "failed", "error": "no"}
    rows["cells"][0]["kl"] = None
    rows["cells"].append(failed)
    rows["scores"] = [row for row in rows["scores"] if row["key"] != "1" or row["use"] != "multiple-choice"]
    found = {(item["use"], item["column"]): item for item in calibration(rows)}
    assert [point["recipe"][-1] for point in found["multiple-choice", "kl"]["points"]] == ["2", "3", "4"]
    assert found["multiple-choice", "same_choice"]["n"] == 4
    rows["cells"] = rows["cells"][:2]
    (item,) = [item for item in calibration(rows) if item["column"] == "excess_nll_predicted"]
    assert (item["n"], item["rho"]) == (2, None)
    assert calibration(rows_of([], [])) == []


def test_a_forecast_is_fitted_on_each_recipe_once(tmp_path: Path) -> None:
    numbers = np.linspace(0.1, 2, 26)
    cells, scores, compared = [], [], {}
    for at, kl in enumerate(numbers):
        for seed in (0, 1):
            key = f"{at}-{seed}"
            cells.append({"key": key, "recipe": f"recipe-{at}", "seed": seed})
            loss = (at + 0.4 * seed) / 40
            row = {"key": key, "use": "short-generation", "decides": "kept", "at_chance": False}
            scores.append(row | {"dense": 0.5, "compressed": 0.5 * (1 - loss)})
            compared[key] = Run(
                {"prompts": pa.table({"token_ids": [[1, 2]]})},
                {
                    "dense": {"name": "tiny", "fingerprint": "abc"},
                    "settings": {"max_new_tokens": 32, "temperature": 1.0, "chat_template": True},
                    "summary": [
                        {
                            "kl": {"mean": float(kl + 0.02 * seed)},
                            "tv": {"mean": 0.1},
                            "survival": {},
                            "excess_nll": {"mean": 0.2},
                            "options": None,
                        }
                    ],
                },
            )
    found = fit_forecast({"cells": cells, "scores": scores}, compared)
    assert found is not None
    (one,) = found["classes"]
    assert (one["use"], one["predictor"], len(one["points"])) == ("short-generation", "kl", 26)
    assert one["points"][3]["recipe"] == "recipe-3"
    assert one["points"][3]["loss"] == pytest.approx(3.2 / 40)
    assert one["points"][3]["predictors"]["kl"] == pytest.approx(numbers[3] + 0.01)
    assert fit_forecast({"cells": cells, "scores": []}, compared) is None
    assert fit_forecast({"cells": cells, "scores": scores}, {}) is None


def test_a_sweep_of_few_recipes_withholds_its_forecasts(tiny: Path, tmp_path: Path) -> None:
    found = sweep(study(tiny, "drop-mlp@0", "wanda:0.5", compare=QUICK, tasks=["core_long"]), tmp_path / "sweep")
    written = read_forecast(tmp_path / "sweep")
    assert written.model_dump() == found.info["forecast"]
    assert written.fingerprint == found.info["dense"]["fingerprint"]
    (one,) = written.classes
    assert one.use == "long-generation"
    assert "rests on 2 recipes" in one.withheld
    assert [point.recipe for point in one.points] == ["drop-mlp@0", "wanda:0.5"]


def test_loss_of_a_class() -> None:
    scores = [
        a_score("a", "multiple-choice", "kept", 0.8, 0.6),
        a_score("a", "multiple-choice", "kept", 0.4, 0.6),
        a_score("a", "multiple-choice", "kept", 0.25, 0.0, at_chance=True),
        a_score("a", "multiple-choice", None, 1.0, 0.0),
        a_score("b", "multiple-choice", "kept", 0.8, 0.2),
        a_score("c", "multiple-choice", "kept", 0.2, 0.1, at_chance=True),
        a_score("a", "short-generation", "kept", 0.5, 0.6),
        a_score("a", "long-generation", "nll", 2.0, 2.5),
        a_score("a", "long-generation", "nll", 1.0, 1.25),
        a_score("a", "long-generation", "loops", 0.0, 1.0),
        a_score("a", "long-generation", "kept", 1.0, 0.0),
        a_score("a", "retrieval", "agreement", 1.0, 0.1),
    ]
    rows = rows_of([], scores)
    assert use_loss(rows, "a", "multiple-choice") == pytest.approx(1 - 1.2 / 1.2)
    assert use_loss(rows, "b", "multiple-choice") == pytest.approx(0.75)
    assert use_loss(rows, "c", "multiple-choice") is None
    assert use_loss(rows, "a", "short-generation") == pytest.approx(-0.2)
    assert use_loss(rows, "a", "long-generation") == pytest.approx(0.375)
    assert use_loss(rows, "a", "retrieval") is None
    assert use_loss(rows, "nobody", "retrieval") is None


def test_models_alike_in_multiple_choice() -> None:
    """Only ties at most 2 points away; the one whose generation suffers most comes last."""
    choices = {
        "far": (0.8, 0.6, True),
        "no tie": (0.8, 0.79, False),
        "bad": (0.8, 0.785, True),
        "good": (0.8, 0.815, True),
        "edge": (0.5, 0.48, True),
        "above": (0.5, 0.521, True),
        "middle": (0.8, 0.8, True),
        "chance": (0.2, 0.2, True),
        "half": (0.8, 0.8, True),
    }
    scores = []
    for key, (dense, compressed, tie) in choices.items():
        own = a_score(key, "multiple-choice", "kept", dense, compressed, tie=tie, at_chance=key == "chance")
        own["difference"] = round(own["difference"], 9)
        scores += [own, a_score(key, "multiple-choice", None, 0.5, 0.1)]
    scores.append(a_score("half", "multiple-choice", "kept", 0.8, 0.7, tie=True))
    for key, compressed in {"bad": 0.1, "good": 0.75, "middle": 0.4, "far": 0.0}.items():
        scores.append(a_score(key, "short-generation", "kept", 0.8, compressed))
    scores += [
        a_score("bad", "long-generation", "nll", 2.0, 3.5),
        a_score("bad", "long-generation", "loops", 0.1, 0.6),
    ]
    found = alike(rows_of([a_cell(key, kl=0.5, survival_8=0.25) for key in choices], scores))
    assert [row["recipe"] for row in found] == [f"drop-mlp@{key}" for key in ("edge", "good", "middle", "bad")]
    assert found[-1] == {
        "recipe": "drop-mlp@bad",
        "choice": 0.785,
        "choice_dense": 0.8,
        "short_kept": pytest.approx(0.125),
        "excess_nll": 1.5,
        "loops": 0.5,
        "survival_8": 0.25,
        "kl": 0.5,
    }
    assert [found[0][name] for name in ("short_kept", "excess_nll", "loops")] == [None] * 3


@pytest.mark.parametrize(
    ("recipe", "kind", "strength"),
    [
        ("drop-attention:4", "drop-attention", "4"),
        ("drop-attention:4,iterative", "drop-attention", "4,iterative"),
        ("drop-mlp@3,1", "drop-mlp", "1,3"),
        ("drop-sublayers@m3,a2", "drop-sublayers", "a2,m3"),
        ("drop-block:2,consecutive", "drop-block", "2,consecutive"),
        ("magnitude:.50", "magnitude", "0.5"),
        ("wanda:2:4", "wanda n:m", "2:4"),
        ("sparsegpt:0.25", "sparsegpt", "0.25"),
        ("drop-experts:0.25", "drop-experts", "0.25"),
        ("drop-experts:0.5,uniform", "drop-experts", "0.5,uniform"),
        ("quantize:int8", "quantize", "int8"),
        ("drop-mlp:1+wanda:2:4", "sum", "drop-mlp:1+wanda:2:4"),
        ("drop-mlp@1+drop-mlp@2", "sum", "drop-mlp@1+drop-mlp@2"),
    ],
)
def test_kind_and_strength_of_a_recipe(recipe: str, kind: str, strength: str) -> None:
    assert _kind(parse_recipe(recipe)) == {"kind": kind, "strength": strength}
    assert is_drop(kind) == (kind in DROPS)
    assert is_mask(kind) == (kind.split()[0] in MASKS)


# --------------------------------------------------------------------------- page


class _Tags(HTMLParser):
    """Tags of a page with the names of their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page_run(text: str) -> Run:
    """A sweep with every section of the page, in which a model, recipes and an error hold a text."""
    rows = hand_made()
    rows["cells"][0] |= {"kind": f"quantize{text}", "strength": text}
    rows["cells"][1] |= {"kind": "wanda"}
    for row in rows["cells"]:
        row["recipe"] = f"{row['key']}{text}"
    for row in rows["scores"]:
        row |= {"recipe": f"{row['key']}{text}", "tie": True, "difference": row["difference"] / 1000}
    line = {"use": "retrieval", "verdict": NOT_MEASURED, "number": text, "value": None, "low": None, "high": None}
    rows["verdicts"] = [
        {"key": row["key"], "recipe": row["recipe"], "seed": 0, **line, "rule": text, "source": text, "reason": text}
        for row in rows["cells"]
    ]
    summary = [
        {"key": row["key"], "recipe": row["recipe"], "seed": 0, "kind": row["kind"], "status": "done", "error": None}
        | {"compressed": row["recipe"], "verdicts": [line]}
        for row, line in zip(rows["cells"], rows["verdicts"], strict=True)
    ]
    summary.append(summary[0] | {"recipe": text, "status": "failed", "error": f"expected, found {text}"})
    given = {"model": text, "seeds": [0], "thresholds": dict.fromkeys(("safe", "broken"), 0.5)}
    given["thresholds"] |= dict.fromkeys(("safe_nll", "broken_nll", "safe_loops", "broken_loops"), 0.5)
    info = {"format": SWEEP.format, "format_version": SWEEP.version, "study": given, "summary": summary}
    info |= {"cells": {"done": 5, "all": 6}, "calibration": calibration(rows), "alike": alike(rows)}
    return Run({name: pa.Table.from_pylist(found, SCHEMAS[name]) for name, found in rows.items()}, info)


def test_foreign_strings_make_no_tags(tmp_path: Path) -> None:
    run = page_run(HOSTILE)
    page, tame = render_sweep(run), render_sweep(page_run("tame"))
    for section in ("answer", "alike", "size", "forecasts", "failed"):
        assert f'id="{section}"' in page
    assert _Tags(page).tags == _Tags(tame).tags
    assert page.count("<script>alert") == page.count("\\u003cscript") == page.count("<img src=x") == 0
    assert "{{7*7}}" in _Tags(page).text
    fragments = [Sweep(page_run(text), tmp_path)._repr_html_() for text in (HOSTILE, "tame")]
    assert _Tags(fragments[0]).tags == _Tags(fragments[1]).tags
    assert HOSTILE[:20] in _Tags(fragments[0]).text
    write_run(run, tmp_path)
    assert render_again(tmp_path) == page


def test_a_page_is_made_again_from_the_tables(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / HOSTILE
    model.symlink_to(tiny)
    recipes = ["drop-mlp@1", "magnitude:0.5", "drop-attention@99"]
    document = study(model, *recipes, tasks=["core_long"], evaluate={"limit": 2, "long_tokens": 8})
    found = sweep(document, tmp_path / "sweep")
    shutil.rmtree(found.folder / "cells")
    page = found.page.read_text(encoding="utf-8")
    assert page == render_again(found.folder)
    assert [item["column"] for item in found.info["calibration"]] == ["excess_nll_predicted", "expected_agreed"]
    tags = [tag for tag, _ in _Tags(page).tags]
    assert "img" not in tags
    assert "drop-attention@99" in _Tags(page).text
    with pytest.raises(PrunelensError, match="expected a sweep"):
        Sweep.open(tmp_path)


def test_figures_keep_their_titles(tiny: Path, tmp_path: Path) -> None:
    study = {"model": str(tiny), "recipes": ["drop-mlp@1"], "tasks": ["core_long"], "compare": None}
    study["evaluate"] = {"limit": 3, "long_tokens": 6}
    page = sweep(study, tmp_path / "out").page.read_text(encoding="utf-8")
    assert "<h3>Whole parts taken out: what each class of use keeps" in page
    assert "<h4>long-generation, loops</h4>" in page
    assert "<h3>long-generation, loops" not in page
