"""Repaired models in whole comparisons and in the benchmark: what is measured of them, and what is said."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from conftest import text_model, tiny_model, words
from prunelens.api import compare
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.results import Comparison
from prunelens.study import calibration_texts as calibration_module
from prunelens.study.benchmark.benchmark import run_benchmark
from prunelens.study.benchmark.record import SpeedSettings
from prunelens.tasks.prompts import PromptText

ATTENTION, BLOCK = "drop-attention@1", "drop-block@1"
LINEAR, BLOCK_LINEAR, FOLDED = f"{ATTENTION}+repair:linear", f"{BLOCK}+repair:linear", f"{BLOCK}+repair:folded"
RECIPES = (ATTENTION, BLOCK, LINEAR, BLOCK_LINEAR, FOLDED)
ASKED = ("What is rain?", "Sing a song.")
OTHERS = ("Name a tree.", "Why is the sea salt?", "Count to three.", "Where do ants live?", "Who was Bach?")
NORM = 32
MAP = 32 * 32 + 32
"""Numbers of a linear map with its bias; one in a sublayer's place reads what its norm gives it."""


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of its own and short calibration texts on a few prompts."""
    folder = tmp_path_factory.mktemp("short")
    lines = [json.dumps({"prompt": text}) for text in OTHERS]
    (folder / "few.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNELENS_CACHE", str(folder / "cache"))
        patch.setattr(calibration_module, "REPAIR_PROMPTS", str(folder / "few.jsonl"))
        patch.setattr(calibration_module, "REPAIR_TOKENS", 12)
        yield


@pytest.fixture(autouse=True)
def _short(short: Any) -> None:
    return None


def prompt(text: str) -> PromptText:
    return PromptText(text, "text", ({"role": "user", "content": text},))


def compared(*recipes: str, **more: Any) -> Comparison:
    settings = {"prompts": [prompt(text) for text in ASKED], "max_new_tokens": 5, "lens_steps": 2} | more
    return compare(text_model(), *recipes, **settings)


def notes(found: Comparison) -> list[str]:
    """What is noted, but for the number of prompts, which is small in all these tests."""
    return [note for note in found.info["notes"] if "intervals of KL" not in note]


@pytest.fixture(scope="module")
def found(short: Any) -> Comparison:
    return compared(*RECIPES, attribute=True)


def rows(table: pa.Table, **equal: Any) -> list[dict[str, Any]]:
    return [row for row in table.to_pylist() if all(row[name] == value for name, value in equal.items())]


def made(found: Comparison, recipe: str) -> dict[str, Any]:
    (record,) = [record for record in found.info["compressed"] if record["label"] == recipe]
    return record


def assert_finite(found: Comparison, *recipes: str) -> None:
    """Every number of every table, and every recipe in each of them."""
    for name, table in found.tables.items():
        for column in table.column_names:
            if pa.types.is_floating(table.schema.field(column).type):
                assert all(math.isfinite(value) for value in table[column].to_pylist() if value is not None), column
        if "compressed" in table.column_names:
            assert set(table["compressed"].to_pylist()) - {"dense"} == set(recipes), name
    for table in ("steps", "layers", "attribution"):
        assert found.tables[table].num_rows
    assert all(row["kl_alone"] is not None for row in rows(found.tables["attribution"], changed=True))
    assert all(record["kl"]["mean"] > 0 for record in found.summary)


# --- a comparison ------------------------------------------------------------------------------------------


def test_every_number_is_finite(found: Comparison) -> None:
    assert_finite(found, *RECIPES)
    assert notes(found) == []


@pytest.mark.parametrize(
    ("recipe", "kind", "dropped"),
    [(LINEAR, "attention", "attention"), (BLOCK_LINEAR, "block", "block"), (FOLDED, "block", "block")],
)
def test_the_run_says_what_was_repaired(found: Comparison, recipe: str, kind: str, dropped: str) -> None:
    record = made(found, recipe)
    (repaired,) = record["repaired"]
    assert set(repaired) == {"kind", "layers", "strength", "explained"}
    assert (repaired["kind"], repaired["layers"]) == (kind, [1])
    assert repaired["strength"] >= 0
    assert -math.inf < repaired["explained"] <= 1
    assert record["dropped"] == {dropped: [1]}
    assert record["recipe"] == recipe


def test_a_bias_has_no_strength_and_a_run_on_disk_says_the_same(tmp_path: Path) -> None:
    recipe = "drop-block@1,2+drop-mlp@3+repair:bias"
    found = compared(recipe, lens_steps=0)
    found.report(tmp_path / "run")
    record = made(Comparison.open(tmp_path / "run"), recipe)
    assert record == made(found, recipe)
    assert [(one["kind"], one["layers"]) for one in record["repaired"]] == [("block", [1, 2]), ("mlp", [3])]
    assert [one["strength"] for one in record["repaired"]] == [None, None]


def test_plain_drops_are_not_repaired(found: Comparison) -> None:
    assert all("repaired" not in made(found, recipe) for recipe in (ATTENTION, BLOCK))


def test_a_repair_is_counted(found: Comparison) -> None:
    sizes = {recipe: made(found, recipe)["parameters"] for recipe in RECIPES}
    assert sizes[LINEAR] == sizes[ATTENTION] + NORM + MAP
    assert sizes[BLOCK_LINEAR] == sizes[BLOCK] + MAP
    assert sizes[FOLDED] == sizes[BLOCK]
    each = found.info["dense"]["bytes"] / found.info["dense"]["parameters"]
    assert made(found, LINEAR)["bytes"] - made(found, ATTENTION)["bytes"] == pytest.approx((NORM + MAP) * each, abs=1)
    low = compared(f"{ATTENTION}+repair:linear,rank=4", f"{ATTENTION}+repair:bias", lens_steps=0)
    ranked, bias = (record["parameters"] for record in low.info["compressed"])
    assert ranked == sizes[ATTENTION] + NORM + 2 * 4 * 32 + 32
    assert bias == sizes[ATTENTION] + NORM + 32


def test_a_repaired_sublayer_is_traced_as_it_runs(found: Comparison) -> None:
    place = {"trace": "local", "layer_idx": 1, "sublayer": "attention"}
    plain, repaired = (rows(found.tables["layers"], compressed=recipe, **place) for recipe in (ATTENTION, LINEAR))
    assert len(plain) == len(repaired) > 0
    assert all(one["hidden_cosine"] != two["hidden_cosine"] for one, two in zip(plain, repaired, strict=True))
    for row in rows(found.tables["layers"], compressed=LINEAR, trace="local"):
        assert (row["hidden_cosine"] == 1) is ((row["layer_idx"], row["sublayer"]) != (1, "attention"))


def test_the_one_repaired_sublayer_is_all_of_the_damage(found: Comparison) -> None:
    changed = rows(found.tables["attribution"], compressed=LINEAR, changed=True)
    assert {(row["layer_idx"], row["sublayer"]) for row in changed} == {(1, "attention")}
    for row in changed:
        steps = rows(found.tables["steps"], compressed=LINEAR, prompt_id=row["prompt_id"], trace="greedy")
        whole = [step["kl_dense_compressed"] for step in steps]
        assert row["num_steps"] == len(whole)
        assert row["kl_alone"] == pytest.approx(sum(whole) / len(whole), rel=1e-4)
        assert row["kl_all_but"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("recipe", "rest"), [(BLOCK_LINEAR, True), (FOLDED, False)])
def test_what_a_repaired_block_changes(found: Comparison, recipe: str, rest: bool) -> None:
    """The map of a block lies in none of its sublayers; a folded one in the MLP before the cut."""
    changed = rows(found.tables["attribution"], compressed=recipe, changed=True, prompt_id=ASKED[0])
    parts = {(row["layer_idx"], row["sublayer"]) for row in changed}
    block = {(1, "attention"), (1, "mlp")}
    assert parts == block | ({(None, "rest")} if rest else {(0, "mlp")})


def test_what_is_changed_further_is_compared_too() -> None:
    """Masks after repairs, and after blocks that are out."""
    recipes = (f"{LINEAR}+magnitude:0.5", f"{BLOCK_LINEAR}+magnitude:0.5", f"{BLOCK}+magnitude:0.5")
    found = compared(*recipes, attribute=True)
    assert_finite(found, *recipes)
    linear, block, plain = (made(found, recipe) for recipe in recipes)
    assert "repaired" not in plain
    for record in (linear, block):
        assert record["masked"]["zeros"] == pytest.approx(record["masked"]["total"] / 2, rel=0.01)
        assert record["repaired"]
    assert block["masked"] == plain["masked"]
    assert block["parameters"] == plain["parameters"] + MAP


def test_masks_are_calibrated_on_the_repaired_model() -> None:
    found = compared(f"{LINEAR}+wanda:2:4", f"{BLOCK_LINEAR}+sparsegpt:0.5", f"{FOLDED}+wanda:0.5", attribute=True)
    assert_finite(found, *(record["label"] for record in found.info["compressed"]))
    assert all(record["masked"] and record["repaired"] for record in found.info["compressed"])


def test_repairs_of_masked_models_are_fitted_to_them() -> None:
    found = compared(f"{ATTENTION}+magnitude:0.5+repair:linear", LINEAR, lens_steps=0)
    masked, plain = (record["repaired"][0]["explained"] for record in found.info["compressed"])
    assert masked != plain


def test_what_is_quantised_after_a_repair_is_compared() -> None:
    pytest.importorskip("torchao")
    recipes = (f"{LINEAR}+quantize:int8", f"{FOLDED}+quantize:int8")
    found = compared(*recipes, attribute=True)
    assert_finite(found, *recipes)
    assert all(record["quantized"] == "int8" and record["repaired"] for record in found.info["compressed"])


# --- what repairs are fitted on ----------------------------------------------------------------------------


def written(path: Path, *texts: str) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return str(path)


def test_texts_that_hold_a_reported_prompt_are_not_fitted_on(tmp_path: Path) -> None:
    held = f"User: {ASKED[0]} Water that falls."
    clean, dirty = written(tmp_path / "clean.jsonl", *OTHERS), written(tmp_path / "dirty.jsonl", held, *OTHERS)
    left_out = compared(LINEAR, ATTENTION, calibration=dirty, lens_steps=0)
    without = compared(LINEAR, ATTENTION, calibration=clean, lens_steps=0)
    assert notes(without) == []
    assert notes(left_out) == [
        f"{LINEAR}: repair:linear: 1 of 6 calibration texts hold what is reported on and were left out of the fit"
    ]
    assert made(left_out, LINEAR)["repaired"] == made(without, LINEAR)["repaired"]
    assert left_out.summary[0]["kl"] == without.summary[0]["kl"]


def test_without_a_repair_no_text_is_left_out(tmp_path: Path) -> None:
    calibration = written(tmp_path / "held.jsonl", *ASKED)
    found = compared("drop-attention:1", "wanda:0.5", calibration=calibration, lens_steps=0)
    assert notes(found) == []


def test_where_every_text_holds_a_reported_prompt_nothing_is_read(tmp_path: Path) -> None:
    begun: list[str] = []

    def reporter(stage: str, total: int, /) -> Callable[[int], None]:
        begun.append(stage)
        return lambda done: None

    calibration = written(tmp_path / "held.jsonl", *ASKED)
    with pytest.raises(PrunelensError, match="other than the prompts and tasks that are reported on"):
        compared(LINEAR, calibration=calibration, reporter=reporter)
    assert set(begun) <= {"dense writes", "ranking sublayers"}


def test_few_tokens_are_told(tmp_path: Path) -> None:
    calibration = written(tmp_path / "few.jsonl", "Name a tree.")
    found = compared(LINEAR, f"{ATTENTION}+repair:bias", calibration=calibration, lens_steps=0)
    assert notes(found) == [f"{LINEAR}: repair:linear: fitted on 12 tokens, fewer than the 32 inputs of a map"]


def test_a_model_of_few_words_is_calibrated_by_a_file(tmp_path: Path) -> None:
    """Its context holds no built-in prompt with a text after it."""
    model = tiny_model()
    calibration = written(tmp_path / "words.jsonl", words(*range(3, 60)), words(*range(40, 90)))
    asked = [prompt(words(5, 9, 33))]
    found = compare(model, LINEAR, prompts=asked, calibration=calibration, max_new_tokens=4, lens_steps=0)
    assert found.summary[0]["kl"]["mean"] > 0


# --- the benchmark -----------------------------------------------------------------------------------------


def measured(model: Model, *recipes: str) -> list[Any]:
    return run_benchmark(model, recipes, SpeedSettings(batch_size=2, context=10, new_tokens=3, repeats=2))


def test_a_repaired_attention_keeps_no_more_in_the_cache_than_none() -> None:
    recipes = (ATTENTION, LINEAR, f"{ATTENTION}+repair:bias", BLOCK, BLOCK_LINEAR, FOLDED)
    dense, plain, linear, bias, block, block_linear, folded = measured(text_model(), *recipes)
    assert dense.kv_bytes_per_token > plain.kv_bytes_per_token
    assert linear.kv_bytes_per_token == bias.kv_bytes_per_token == plain.kv_bytes_per_token
    assert block_linear.kv_bytes_per_token == folded.kv_bytes_per_token == block.kv_bytes_per_token
    assert linear.weight_bytes_in_memory == plain.weight_bytes_in_memory + 4 * (NORM + MAP)
    assert bias.weight_bytes_in_memory == plain.weight_bytes_in_memory + 4 * (NORM + 32)
    assert block_linear.weight_bytes_in_memory == block.weight_bytes_in_memory + 4 * MAP
    assert folded.weight_bytes_in_memory == block.weight_bytes_in_memory
    assert folded.weight_bytes_stored == block.weight_bytes_stored
    assert "unless --format nemotron-nas leaves them out" in " ".join(plain.notes)
    assert "nemotron-nas" not in " ".join(linear.notes)
