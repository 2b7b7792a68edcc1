"""Stored results that somebody has changed: every field of every kind, drawn again or refused by file and field."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plotly.offline
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import text_model, text_network, text_tokenizer
from prunelens.api import advise, compare, evaluate, sweep
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.report.pages.rerender import render_again
from prunelens.results import Comparison
from prunelens.study.advise.search import Search
from prunelens.study.sweep import cells
from prunelens.study.sweep.executors import EXECUTORS, Outcome

KINDS = ("run", "evaluation", "sweep", "advice")
VALUES: tuple[Any, ...] = (None, [], {"": None}, -1, 10**30, "x" * 5_000)


def in_process(jobs: list[Any], given: Any, *rest: Any) -> Iterator[Outcome]:
    context = cells.setup(given)
    for job in jobs:
        cells.work(context, job)
        yield Outcome(job)


def make(kind: str, folder: Path, model: Model) -> None:
    """A real result of each kind, with everything in it that a page can show."""
    if kind == "run":
        lines = [{"prompt": "hello"}, {"prompt": "two", "options": ["a", "b"], "answer": "a"}]
        (folder.parent / "p.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        asked = {"attribute": True, "draft": True, "lens": "both", "max_new_tokens": 4}
        compare(model, "drop-attention:1", "drop-mlp@1", prompts=folder.parent / "p.jsonl", **asked).report(folder)
    elif kind == "evaluation":
        evaluate(model, "drop-mlp:1", tasks="core_long,core_retrieval", limit=2, long_tokens=4).report(folder)
    elif kind == "sweep":
        checkpoint = folder.parent / "tiny"
        text_network().save_pretrained(checkpoint)
        text_tokenizer().save_pretrained(checkpoint)
        quick = {"compare": {"num_prompts": 2, "max_new_tokens": 4}, "evaluate": {"limit": 2, "long_tokens": 4}}
        sweep({"model": str(checkpoint), "recipes": ["drop-mlp:1", "wanda:0.5"], "tasks": "core_long"} | quick, folder)
    else:
        with pytest.MonkeyPatch.context() as patch:
            for stage in ("masks", "together"):  # what is tried is no matter here
                patch.setattr(Search, stage, lambda self: None)
            found = advise(model, "long-generation", folder.parent / "a", tasks="core_long", limit=2, long_tokens=4)
        shutil.copytree(found.folder, folder)


@pytest.fixture(scope="module", params=KINDS)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("stored") / request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXECUTORS, "local", in_process)
        patch.setattr(plotly.offline, "get_plotlyjs", lambda: "")
        make(request.param, folder, text_model())
        yield folder


@pytest.fixture
def run(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "run"))


def paths(document: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Every place in a document; of a list its first item, of places named alike (`mean`, `low`, `high`) the first."""
    found: dict[Any, tuple[Any, ...]] = {}

    def walk(value: Any, path: tuple[Any, ...]) -> None:
        if path:
            found.setdefault((path[-1], type(value)), path)
        items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
        for key, item in items:
            walk(item, (*path, key))

    walk({name: value for name, value in document.items() if name != "units"}, ())
    return list(found.values())


def replaced(info: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    found = copy.deepcopy(info)
    place: Any = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return found


def info_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


def put(folder: Path, info: Any) -> None:
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")


def drawn_or_refused(folder: Path) -> bool:
    """Whether the page was drawn; anything but one short sentence fails the test."""
    said = refusal(folder)
    assert said is None or ("run.json" in said and len(said) < 1_000), said
    return said is None


def refusal(folder: Path) -> str | None:
    """Why the page was not drawn; None where it was."""
    try:
        assert render_again(folder).startswith("<!")
    except PrunelensError as error:
        return str(error)
    return None


def test_what_this_version_writes_is_drawn_again(run: Path) -> None:
    assert drawn_or_refused(run)


def test_no_value_in_any_place_is_a_traceback(run: Path) -> None:
    info = info_of(run)
    refused = 0
    for turn, path in enumerate(paths(info)):
        for place in range(len(VALUES)):  # until a page is drawn, which takes longest, beginning elsewhere each time
            put(run, replaced(info, path, VALUES[(turn + place) % len(VALUES)]))
            if drawn_or_refused(run):
                break
            refused += 1
    assert refused > 50


def test_a_missing_field_is_named_or_not_needed(run: Path) -> None:
    info = info_of(run)
    for path in paths(info):
        if not isinstance(path[-1], str):
            continue
        found = replaced(info, path, None)
        place: Any = found
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        put(run, found)
        drawn_or_refused(run)


def test_an_unbounded_number_or_depth_is_refused(run: Path) -> None:
    text = (run / "run.json").read_text(encoding="utf-8")
    for value in ("1e400", "9" * 5_000, "NaN", "[" * 3_000 + "]" * 3_000):
        (run / "run.json").write_text('{"more": ' + value + "," + text.lstrip()[1:], encoding="utf-8")
        with pytest.raises(PrunelensError, match=r"run\.json"):
            render_again(run)


def test_a_field_is_named(run: Path) -> None:
    info = info_of(run)
    for value, said in ((None, "found null"), ("text", "found 'text'"), (3, "found 3")):
        put(run, info | {"summary" if "summary" in info else "verdicts": value})
        with pytest.raises(PrunelensError, match=rf"run\.json: the field (summary|verdicts): .*{said}; run \w+ again"):
            render_again(run)


def test_tables_without_rows_or_of_other_columns(run: Path) -> None:
    for path in sorted(run.glob("*.parquet")):
        whole = path.read_bytes()
        table = pq.read_table(path)
        for changed in (
            table.slice(0, 0),
            table.drop_columns([table.column_names[0]]),
            table.rename_columns([f"{name}x" for name in table.column_names]),
            table.set_column(0, table.column_names[0], pa.array([b"x"] * table.num_rows)),
            pa.Table.from_arrays([pa.nulls(table.num_rows, field.type) for field in table.schema], schema=table.schema),
        ):
            pq.write_table(changed, path)
            said = refusal(run)
            assert said is None or path.name in said or "contradict" in said
        for damaged in (b"", whole[:100], whole[: len(whole) // 2], b"PAR1" + b"\0" * 50 + b"PAR1"):
            path.write_bytes(damaged)
            with pytest.raises(PrunelensError, match=path.name):
                render_again(run)
        path.unlink()
        with pytest.raises(PrunelensError, match=path.name):
            render_again(run)
        path.write_bytes(whole)
    assert drawn_or_refused(run)


def test_tables_of_other_models_are_told(run: Path) -> None:
    """Labels in run.json that no table knows."""
    info = info_of(run)
    for key in ("compressed", "summary"):
        for record in info.get(key, []):
            record["label" if key == "compressed" else "compressed"] = "nobody"
    put(run, info)
    drawn_or_refused(run)


@pytest.mark.parametrize("content", ["null", "[]", "3", '"x"', "", "{}", '{"format": null}', '{"format": ["a"]}'])
def test_a_record_of_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(PrunelensError, match=r"expected a run .*found"):
        render_again(tmp_path)


def test_another_version_and_another_kind(run: Path) -> None:
    info = info_of(run)
    for version in (0, 99, "4", None, [4], 10**40, True):
        put(run, info | {"format_version": version})
        with pytest.raises(PrunelensError, match=r"format .*this version reads|lacks format_version|damaged"):
            render_again(run)
    for mark in ("prunelens-other", None, 3):
        put(run, info | {"format": mark})
        with pytest.raises(PrunelensError, match="of another kind"):
            render_again(run)
    if info["format"] != "prunelens-run":
        put(run, info)
        with pytest.raises(PrunelensError, match="of another kind"):
            Comparison.open(run)
