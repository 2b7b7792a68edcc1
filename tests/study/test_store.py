"""Runs on disk: what is written comes back, columns are those promised, a folder is replaced whole or not at all."""

import copy
import errno
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prunelens.errors import PrunelensError
from prunelens.study.compare.schemas import RUN, SCHEMAS, STAT_COLUMNS
from prunelens.study.store import Run, read_run, replace_page, write_run

INFO: dict[str, Any] = {
    "format": RUN.format,
    "format_version": RUN.version,
    **{name: {} for name in RUN.required},
    "anchors": [],
    "notes": ["ein Maß: ½ ≤ S(n) 🦔"],
    "summary": [{"compressed": "drop-mlp:1", "kl": 1e-300, "n": None}],
}


def value(kind: pa.DataType, number: random.Random) -> Any:
    if pa.types.is_list(kind):
        return [value(kind.value_type, number) for _ in range(number.randrange(4))]
    if pa.types.is_string(kind):
        return number.choice(["", "ä\n\u2028", "w3", "\x00"])
    if pa.types.is_boolean(kind):
        return number.random() < 0.5
    return number.randrange(-5, 2**31 - 1) if pa.types.is_integer(kind) else float(number.randrange(1000)) / 8


def table(name: str, rows: int) -> pa.Table:
    """Values of every type, one in five null."""
    number = random.Random(name)
    schema = SCHEMAS[name]
    records = [
        {field.name: None if number.random() < 0.2 else value(field.type, number) for field in schema}
        for _ in range(rows)
    ]
    return pa.Table.from_pylist(records, schema)


def run(rows: int = 7) -> Run:
    return Run({name: table(name, rows) for name in SCHEMAS}, copy.deepcopy(INFO))


def store(target: Path, rows: int = 7) -> Path:
    with RUN.new_folder(target) as temporary:
        write_run(run(rows), temporary)
    return target


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


# --- what is written comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_a_run_comes_back_as_it_was(tmp_path: Path, rows: int) -> None:
    found = read_run(store(tmp_path / "run", rows), RUN)
    expected = run(rows)
    assert found.info == INFO
    assert set(found.tables) == set(SCHEMAS)
    for name, expected_table in expected.tables.items():
        assert found.tables[name].equals(expected_table), name
        assert found.tables[name].schema.equals(SCHEMAS[name]), name


def test_files_hold_exactly_the_promised_columns(tmp_path: Path) -> None:
    folder = store(tmp_path / "run")
    assert {path.name for path in folder.iterdir()} == {f"{name}.parquet" for name in SCHEMAS} | {"run.json"}
    for name, schema in SCHEMAS.items():
        found = pq.ParquetFile(folder / f"{name}.parquet").schema_arrow
        assert found.names == schema.names
        assert found.types == schema.types


def test_run_json_can_be_read_by_a_person_and_by_any_parser(tmp_path: Path) -> None:
    text = (store(tmp_path / "run") / "run.json").read_text(encoding="utf-8")
    assert "ein Maß: ½ ≤ S(n) 🦔" in text
    assert text.endswith("}\n")
    assert text.count("\n") > len(RUN.required)
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == INFO


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_know_are_null_with_a_reason(tmp_path: Path, number: float) -> None:
    bad = run()
    bad.info["summary"][0]["kl"] = number
    with RUN.new_folder(tmp_path / "run") as temporary:
        write_run(bad, temporary)
    found = json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["summary"][0]["kl"] is None
    assert "not a finite number" in found["nulls"]["summary.0.kl"]
    assert {name for name in found["nulls"] if name not in INFO["nulls"]} == {"summary.0.kl"}


def test_a_run_may_live_in_a_folder_named_like_a_setting(tmp_path: Path) -> None:
    found = read_run(store(tmp_path / "seed=1" / "run"), RUN)
    assert found.tables["steps"].equals(run().tables["steps"])


# --- a contract with other people's scripts ----------------------------------------------------------------

SPACES = (
    "hidden_cosine hidden_alpha hidden_rho "
    "logit_cosine logit_cosine_centered logit_rms_delta logit_var_uniform "
    "prob_cosine kl_dense_compressed kl_compressed_dense js tv same_top1 rank_of_dense_top1 topk_overlap "
    "delta_p_top1 delta_p_token entropy_dense entropy_compressed acceptance "
    "prob_deviation_estimate kl_estimate kl_estimate_third trust"
).split()
SURVIVAL = "survival_sampled survival_bound survival_greedy survival_coupled".split()
CONTRACT = {
    "prompts": ["prompt_id", "kind", "text", "token_ids"],
    "steps": [
        *["compressed", "prompt_id", "trace", "step", "position", "token_id", "contexts_differ"],
        *SPACES,
    ],
    "prompt_end": ["compressed", "prompt_id", "space", "margin", *SPACES],
    "survival": ["compressed", "n", *[f"{name}{end}" for name in SURVIVAL for end in ("", "_low", "_high")]],
}


@pytest.mark.parametrize("name", CONTRACT)
def test_promised_columns_are_there(name: str) -> None:
    assert set(CONTRACT[name]) <= set(SCHEMAS[name].names)
    assert len(set(SCHEMAS[name].names)) == len(SCHEMAS[name].names)


def test_promised_columns_have_lasting_types() -> None:
    types = {
        **dict.fromkeys(["compressed", "prompt_id", "trace", "kind", "text", "space"], pa.string()),
        **dict.fromkeys(["step", "position", "token_id", "n", "rank_of_dense_top1"], pa.int32()),
        **dict.fromkeys(["contexts_differ", "same_top1"], pa.bool_()),
        "token_ids": pa.list_(pa.int32()),
    }
    for name, columns in CONTRACT.items():
        for column in columns:
            assert SCHEMAS[name].field(column).type == types.get(column, pa.float64()), (name, column)


def test_every_statistic_has_a_unit_and_a_column() -> None:
    assert set(SPACES) <= set(STAT_COLUMNS)
    for name in ("steps", "prompt_end"):
        assert [column for column in SCHEMAS[name].names if column in STAT_COLUMNS] == list(STAT_COLUMNS)
    assert set(STAT_COLUMNS.values()) <= {"1", "logit", "logit²", "nat", "bool", "rank", "probability"}


# --- whole or not at all -----------------------------------------------------------------------------------


def test_an_earlier_run_is_replaced_whole(tmp_path: Path) -> None:
    target = store(tmp_path / "run")
    (target / "extra.txt").write_text("of the earlier run")
    (target / "folder").mkdir()
    with RUN.new_folder(target) as temporary:
        assert (target / "extra.txt").exists()
        write_run(run(3), temporary)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (target / "extra.txt").exists()
    assert read_run(target, RUN).tables["steps"].num_rows == 3


def test_an_earlier_run_of_another_version_may_be_replaced(tmp_path: Path) -> None:
    target = store(tmp_path / "run")
    (target / "run.json").write_text(json.dumps(INFO | {"format_version": 99}))
    assert read_run(store(target), RUN).info["format_version"] == RUN.version


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    read_run(store(tmp_path / "run"), RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_link_to_a_run_leaves_that_run_alone(tmp_path: Path) -> None:
    store(tmp_path / "first")
    before = tree(tmp_path / "first")
    (tmp_path / "latest").symlink_to("first")
    store(tmp_path / "latest", rows=3)
    assert read_run(tmp_path / "latest", RUN).tables["steps"].num_rows == 3
    if not (tmp_path / "latest").is_symlink():
        assert tree(tmp_path / "first") == before
    assert {path.name for path in tmp_path.iterdir()} == {"first", "latest"}


# --- where a run may go ------------------------------------------------------------------------------------


def holds_another_json(path: Path) -> None:
    path.mkdir()
    (path / "run.json").write_text('{"format": "of another program"}')


def holds_a_list(path: Path) -> None:
    path.mkdir()
    (path / "run.json").write_text("[]")


@pytest.mark.parametrize(
    "make",
    [
        holds_another_json,
        holds_a_list,
        lambda path: path.write_text("a file"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to("/"),
    ],
)
@pytest.mark.parametrize("check", [RUN.probe_target, store])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, make: Callable[[Path], Any], check: Callable[..., Any]) -> None:
    target = tmp_path / "run"
    make(target)
    before = {path: path.lstat().st_mtime_ns for path in (tmp_path, target)}
    with pytest.raises(PrunelensError, match=r"new folder or an earlier run .*run, which is neither; name another"):
        check(target)
    assert {path: path.lstat().st_mtime_ns for path in (tmp_path, target)} == before
    assert list(tmp_path.iterdir()) == [target]


def test_the_current_folder_is_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read_run(store(Path("run")), RUN)
    RUN.probe_target(Path("run"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- the page ----------------------------------------------------------------------------------------------


def test_a_page_is_put_in_or_replaced(tmp_path: Path) -> None:
    target = store(tmp_path / "run")
    assert replace_page(target, "<p>eins ½") == target / "report.html"
    assert (target / "report.html").read_text(encoding="utf-8") == "<p>eins ½"
    assert (target / "report.html").stat().st_mode & 0o777 == 0o644
    (target / "report.html").chmod(0o640)
    before = tree(target)
    replace_page(target, "two")
    assert tree(target) == before | {"report.html": b"two"}
    assert (target / "report.html").stat().st_mode & 0o777 == 0o640


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = store(tmp_path / "run")
    replace_page(target, "old")
    before = tree(tmp_path)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PrunelensError, match=r"report\.html .*No space left.*free space"):
        replace_page(target, "new")
    assert tree(tmp_path) == before


# --- what cannot be read -----------------------------------------------------------------------------------


def json_of(**values: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "run.json").write_text(json.dumps(INFO | values))


def without(key: str) -> Callable[[Path], None]:
    kept = {name: found for name, found in INFO.items() if name != key}
    return lambda folder: (folder / "run.json").write_text(json.dumps(kept))


def changed(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        pq.write_table(change(pq.read_table(folder / "steps.parquet")), folder / "steps.parquet")

    return apply


def retyped(found: pa.Table) -> pa.Table:
    return found.set_column(found.column_names.index("js"), "js", found["js"].cast(pa.float32()))


def cut(share: float) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = (folder / "steps.parquet").read_bytes()
        (folder / "steps.parquet").write_bytes(data[: int(share * len(data))])

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "expected a run"),
        (lambda folder: (folder / "run.json").unlink(), "expected a run"),
        (lambda folder: (folder / "run.json").write_text("{"), "expected a run"),
        (json_of(format="other"), "expected a run"),
        (json_of(format_version=99), "format 99, this version reads 4"),
        (json_of(format_version=1), "format 1, this version reads 4"),
        (json_of(format_version="2"), "format 2, this version reads 4"),
        (without("format_version"), "damaged.*format_version"),
        *[(without(key), f"damaged.*{key}") for key in RUN.required],
        (lambda folder: (folder / "prompts.parquet").unlink(), r"damaged.*prompts\.parquet"),
        (cut(0), "damaged"),
        (cut(0.5), "damaged"),
        (cut(0.99), "damaged"),
        (changed(lambda found: found.drop_columns(["js"])), r"steps\.parquet has other columns"),
        (changed(lambda found: found.append_column("more", found["js"])), r"steps\.parquet has other columns"),
        (changed(lambda found: found.select(found.column_names[::-1])), r"steps\.parquet has other columns"),
        (changed(retyped), r"steps\.parquet has other columns"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    target = store(tmp_path / "run")
    damage(target)
    with pytest.raises(PrunelensError, match=said) as caught:
        read_run(target, RUN)
    assert str(target) in str(caught.value)
    assert "expected a run" in str(caught.value) or "run compare again" in str(caught.value)
