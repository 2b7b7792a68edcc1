"""The looks inside a whole comparison on tiny models: tables, exact zeros, the summary recomputed, the way to disk."""

import copy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch

import layer_oracle
import prunelens.cli.main
from conftest import tiny_model, words
from prunelens.api import compare
from prunelens.errors import PrunelensError
from prunelens.metrics.intervals import ratio_interval
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.results import Comparison
from prunelens.study.compare.schemas import RUN, SCHEMAS, STAT_COLUMNS
from prunelens.tasks.prompts import PromptText
from prunelens.tracing import noise
from prunelens.tracing.generate import Greedy, write

TEXTS = [(5, 9, 33), (4, 90, 17, 60, 61), (20,), (88, 12, 40, 41, 42, 43, 7)]
HORIZON = 9
BOTH, ONE, THREE, MLP = "drop-attention@1,3", "drop-attention@1", "drop-attention@3", "drop-mlp@2"
DROPPED = {BOTH: {(1, "attention"), (3, "attention")}, ONE: {(1, "attention")}, THREE: {(3, "attention")}}
DROPPED[MLP] = {(2, "mlp")}
CHANGED = {(1, "attention"), (2, "mlp")}
CHECKPOINTS = {"changed": CHANGED, "normed": set()}
PARTS = [(layer_idx, kind) for layer_idx in range(4) for kind in ("attention", "mlp")]
ZEROS = (
    "hidden_alpha hidden_rho logit_alpha logit_rho logit_rms_delta logit_var_uniform kl_dense_compressed tv js trust "
    "kl_compressed_dense delta_p_top1 delta_p_token prob_deviation_estimate kl_estimate kl_estimate_third"
).split()
ONES = (
    "hidden_cosine logit_cosine logit_cosine_centered prob_cosine same_top1 rank_of_dense_top1 topk_overlap acceptance"
).split()
HIDDEN = ("hidden_cosine", "hidden_alpha", "hidden_rho")


class Case(NamedTuple):
    family: str
    found: Comparison
    stages: dict[str, list[int]]


def asked() -> list[PromptText]:
    return [PromptText(f"p{ids[0]}", "text", ({"role": "user", "content": words(*ids)},), (), None) for ids in TEXTS]


def looked(dense: Model, *compressed: Any, **more: Any) -> Comparison:
    return compare(
        dense, *compressed, **{"prompts": asked(), "max_new_tokens": HORIZON, "chat_template": False, **more}
    )


def dense_model(family: str) -> Model:
    """A tiny model that ends one of its texts early."""
    model = tiny_model(family)
    (text,) = write(model, [list(TEXTS[1])], [Greedy()], 5, batch_size=1)
    model.network.generation_config.eos_token_id = text.token_ids[4]
    return model


def final_norm(network: Any) -> torch.nn.Module:
    return network.gpt_neox.final_layer_norm if network.config.model_type == "gpt_neox" else network.model.norm


def checkpoints(dense: Model) -> list[Model]:
    """One with two sublayers changed, one with another final norm."""
    changed = copy.deepcopy(dense.network)
    for number, part in enumerate(sorted(CHANGED)):
        changed = layer_oracle.perturb_sublayer(changed, *part, 0.2, seed=number)
    normed = copy.deepcopy(dense.network)
    final_norm(normed).weight.data[:16] *= 1.5
    return [wrap(changed, dense.tokenizer, "changed"), wrap(normed, dense.tokenizer, "normed")]


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def case(request: pytest.FixtureRequest) -> Case:
    dense = dense_model(request.param)
    stages: dict[str, list[int]] = {}

    def reporter(stage: str, total: int) -> Any:
        counts = stages.setdefault(stage, [total, 0])

        def advance(done: int) -> None:
            counts[1] += done

        return advance

    found = looked(
        dense,
        *(BOTH, ONE, THREE, MLP, *checkpoints(dense)),
        attribute=True,
        lens="both",
        lens_steps=4,
        noise_dtype="float64",
        reporter=reporter,
    )
    return Case(request.param, found, stages)


def rows(table: pa.Table, **equal: Any) -> list[dict[str, Any]]:
    return [row for row in table.to_pylist() if all(row[name] == value for name, value in equal.items())]


def place(row: dict[str, Any]) -> tuple[int, str]:
    return row["layer_idx"], row["sublayer"]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["prompt_id"], row["step"], row["lens"], *place(row)


def lengths(found: Comparison) -> dict[str, int]:
    texts = rows(found.tables["continuations"], model="dense", trace="greedy")
    return {text["prompt_id"]: len(text["token_ids"]) for text in texts}


def assert_exactly_equal(row: dict[str, Any]) -> None:
    """The row of two equal models, as far as it was measured."""
    for value, names in ((0, ZEROS), (1, ONES)):
        assert all(row[name] in (value, None) for name in names if name in row), row
    assert row["hidden_cosine"] == 1
    assert row["entropy_dense"] == row["entropy_compressed"]
    assert row["amplification"] is None


# --- the table layers --------------------------------------------------------------------------------------


def test_columns_of_the_tables(case: Case) -> None:
    stats = list(STAT_COLUMNS)
    where = ["prompt_id", "trace", "step", "position", "token_id"]
    tables = case.found.tables
    assert tables["layers"].column_names == ["compressed", *where, "layer_idx", "sublayer", "lens", *stats]
    assert tables["noise"].column_names == ["against", *where, *stats]
    assert tables["attribution"].column_names == (
        "compressed prompt_id layer_idx sublayer changed num_steps kl_alone tv_alone kl_all_but tv_all_but".split()
    )
    for name, schema in SCHEMAS.items():
        assert tables[name].schema.equals(schema)
    for column in ("layer_idx", "step", "position", "token_id"):
        assert tables["layers"][column].type == pa.int32()
    assert case.found.info["format_version"] == RUN.version


def test_every_sublayer_has_rows_at_the_sampled_steps(case: Case) -> None:
    steps = case.found.info["lens"]["steps"]
    assert steps == [1, 4, 6, 9]
    assert case.found.info["lens"] == {
        "lens": "both",
        "steps": steps,
        "horizon": HORIZON,
        "prompts": len(TEXTS),
        "parallel": case.family == "gpt_neox",
    }
    number = lengths(case.found)
    assert min(number.values()) < HORIZON == max(number.values())
    sampled = {(prompt, step) for prompt, length in number.items() for step in steps if step <= length}
    every = {(prompt, step) for prompt, length in number.items() for step in range(1, length + 1)}
    table = case.found.tables["layers"]
    wanted: set[tuple[str, str]] = {("dense", "dropped")}
    wanted |= {(label, trace) for label in (*DROPPED, *CHECKPOINTS) for trace in ("local", "cumulative")}
    assert {(row["compressed"], row["trace"]) for row in table.select(["compressed", "trace"]).to_pylist()} == wanted
    for label, trace in wanted:
        for lens in ("normed", "raw"):
            expected = every if (trace, lens) == ("cumulative", "raw") else sampled
            own = rows(table, compressed=label, trace=trace, lens=lens)
            assert sorted(map(key, own)) == sorted((*at, lens, *part) for at in expected for part in PARTS)
            for row in own:
                read = (row["prompt_id"], row["step"]) in sampled
                assert (row["kl_dense_compressed"] is not None) == read
                assert (row["logit_cosine"] is not None) == read
                assert (row["entropy_dense"] is not None) == read
                assert all(row[name] is not None for name in HIDDEN)


def test_position_and_token_are_those_of_the_steps(case: Case) -> None:
    greedy = rows(case.found.tables["steps"], compressed=BOTH, trace="greedy")
    steps = {(row["prompt_id"], row["step"]): (row["position"], row["token_id"]) for row in greedy}
    for name in ("layers", "noise"):
        for row in case.found.tables[name].to_pylist():
            assert steps[row["prompt_id"], row["step"]] == (row["position"], row["token_id"])


def test_local_rows_of_a_recipe(case: Case) -> None:
    table = case.found.tables["layers"]
    alone = {key(row): row for row in rows(table, trace="dropped")}
    assert all(row["kl_dense_compressed"] > 0 for row in alone.values())
    for label, dropped in DROPPED.items():
        for row in rows(table, compressed=label, trace="local"):
            if place(row) in dropped:
                assert row | {"compressed": "dense", "trace": "dropped"} == alone[key(row)]
            else:
                assert_exactly_equal(row)
                assert row["kl_dense_compressed"] == 0
                assert row["entropy_dense"] == alone[key(row)]["entropy_dense"]


def test_local_rows_of_a_checkpoint(case: Case) -> None:
    table = case.found.tables["layers"]
    for label, changed in CHECKPOINTS.items():
        for row in rows(table, compressed=label, trace="local"):
            if place(row) in changed:
                assert row["kl_dense_compressed"] > 0
                assert row["hidden_cosine"] < 1
            else:
                assert_exactly_equal(row)
                assert row["kl_dense_compressed"] == 0


def test_nothing_deviates_before_the_first_change(case: Case) -> None:
    table = case.found.tables["layers"]
    for label, changed in (DROPPED | {"changed": CHANGED}).items():
        for row in rows(table, compressed=label, trace="cumulative"):
            if PARTS.index(place(row)) < min(map(PARTS.index, changed)):
                assert_exactly_equal(row)
            elif place(row) == (3, "mlp"):
                assert row["hidden_cosine"] < 1
    for row in rows(table, compressed="normed", trace="cumulative"):
        if row["lens"] == "raw" and row["logit_cosine"] is None:
            assert (row["hidden_cosine"], row["hidden_alpha"], row["hidden_rho"]) == (1, 0, 0)
        if row["lens"] == "normed":
            assert row["hidden_cosine"] < 1


def test_the_last_depth_is_the_table_of_steps(case: Case) -> None:
    ints = ("same_top1", "rank_of_dense_top1", "topk_overlap")
    for label in (*DROPPED, *CHECKPOINTS):
        greedy = {
            (row["prompt_id"], row["step"]): row
            for row in rows(case.found.tables["steps"], compressed=label, trace="greedy")
        }
        last = rows(
            case.found.tables["layers"],
            compressed=label,
            trace="cumulative",
            lens="normed",
            layer_idx=3,
            sublayer="mlp",
        )
        assert last
        for row in last:
            step = greedy[row["prompt_id"], row["step"]]
            for name in STAT_COLUMNS:
                if name in ints:
                    assert row[name] == step[name]
                elif not name.startswith("amplification"):
                    assert row[name] == pytest.approx(step[name], rel=1e-5, abs=1e-6), (label, name)


def test_nulls_are_explained(case: Case) -> None:
    nulls = case.found.info["nulls"]
    assert any(name.startswith("layers.logit_*") for name in nulls)
    for name in ("layers", "attribution", "noise"):
        empty = [column for column in SCHEMAS[name].names if case.found.tables[name][column].null_count]
        assert all(column in "".join(nulls) or name == "layers" for column in empty), (empty, nulls)
        assert bool(empty) == any(entry.startswith(f"{name}.") for entry in nulls), (empty, nulls)


def test_progress_reaches_its_totals(case: Case) -> None:
    for stage in ("reading every sublayer", "attributing the damage", "noise floor", "noise floor in float64"):
        total, done = case.stages[stage]
        assert total == done > 0


def test_by_default_raw_rows_hold_h_alone() -> None:
    dense = dense_model("llama")
    found = looked(dense, BOTH, checkpoints(dense)[0])
    assert found.info["lens"]["lens"] == "normed"
    assert found.info["lens"]["steps"] == [1, 2, 3, 4, 6, 7, 8, 9]
    table = found.tables["layers"]
    raw = rows(table, lens="raw")
    assert {row["trace"] for row in raw} == {"cumulative"}
    assert len(raw) == 2 * len(PARTS) * sum(lengths(found).values())
    for row in raw:
        assert all((row[name] is not None) == (name in HIDDEN) for name in STAT_COLUMNS)
    assert table["kl_dense_compressed"].null_count == len(raw)
    assert found.tables["attribution"].num_rows == 0
    assert all(record["attribution"] is None for record in found.summary)
    assert set(found.tables["noise"]["against"].to_pylist()) == {"batch shape"}


def test_raw_lens_alone() -> None:
    found = looked(dense_model("llama"), MLP, lens="raw", lens_steps=2)
    table = found.tables["layers"]
    assert set(table["lens"].to_pylist()) == {"raw"}
    assert found.info["lens"]["steps"] == [1, 9]
    for row in table.to_pylist():
        assert (row["tv"] is not None) == (row["step"] in (1, 9))


def test_no_lens_leaves_the_table_empty() -> None:
    found = looked(dense_model("llama"), MLP, lens_steps=0, attribute=True)
    assert found.tables["layers"].num_rows == 0
    assert found.tables["layers"].schema.equals(SCHEMAS["layers"])
    assert found.info["lens"] is None
    assert found.tables["attribution"].num_rows == len(TEXTS) * 4


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_checkpoint_with_fewer_blocks_has_no_rows_and_a_reason(family: str) -> None:
    dense = dense_model(family)
    network = copy.deepcopy(dense.network)
    del (network.gpt_neox if family == "gpt_neox" else network.model).layers[3]
    network.config.num_hidden_layers = 3
    shorter = wrap(network, dense.tokenizer, "shorter")
    found = looked(dense, shorter, MLP, attribute=True, lens_steps=2)
    for name in ("layers", "attribution"):
        assert "shorter" not in found.tables[name]["compressed"].to_pylist()
        assert MLP in found.tables[name]["compressed"].to_pylist()
    assert "3 blocks" in found.info["nulls"]["layers.shorter"]
    assert "4" in found.info["nulls"]["layers.shorter"]
    assert f"layers.{MLP}" not in found.info["nulls"]
    assert found.summary[0]["attribution"] is None
    assert found.summary[0]["kl"]["mean"] > 0
    alone = looked(dense, shorter, attribute=True, lens_steps=2)
    assert alone.tables["layers"].num_rows == alone.tables["attribution"].num_rows == 0
    assert alone.tables["noise"].num_rows > 0


# --- the table attribution and its summary -----------------------------------------------------------------


def weighted(found: list[dict[str, Any]], name: str) -> float:
    steps = np.array([row["num_steps"] for row in found])
    return float(np.sum(np.array([row[name] for row in found]) * steps) / np.sum(steps))


def spearman(left: list[float], right: list[float]) -> float:
    """Of values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (left, right)]
    assert all(len(set(values)) == len(values) for values in (left, right))
    n = len(left)
    return 1 - 6 * float(np.sum((ranks[0] - ranks[1]) ** 2)) / (n * (n**2 - 1))


def test_rows_of_attribution(case: Case) -> None:
    table = case.found.tables["attribution"]
    number = lengths(case.found)
    for label, dropped in DROPPED.items():
        kinds = {kind for _, kind in dropped}
        own = rows(table, compressed=label)
        expected = [(prompt, *part) for prompt in number for part in PARTS if part[1] in kinds]
        assert sorted((row["prompt_id"], *place(row)) for row in own) == sorted(expected)
        assert all(row["changed"] == (place(row) in dropped) for row in own)
    for label, parts in {"changed": CHANGED, "normed": {(None, "rest")}}.items():
        own = rows(table, compressed=label)
        assert sorted((row["prompt_id"], *place(row)) for row in own) == sorted(
            (prompt, *part) for prompt in number for part in parts
        )
        assert all(row["changed"] for row in own)
    for row in table.to_pylist():
        assert row["num_steps"] == number[row["prompt_id"]]
        assert row["kl_alone"] > 0
        assert 0 < row["tv_alone"] <= 1
        for name in ("kl_all_but", "tv_all_but"):
            assert (row[name] is not None) == row["changed"]


def test_a_part_alone_is_the_model_that_changes_it_alone(case: Case) -> None:
    """Of two dropped parts, one alone is the recipe of it, and all but it the recipe of the other."""
    table, mean = case.found.tables["attribution"], {record["compressed"]: record for record in case.found.summary}
    for layer_idx, own, other in ((1, ONE, THREE), (3, THREE, ONE)):
        part = rows(table, compressed=BOTH, layer_idx=layer_idx)
        for name, column in (("kl", "kl"), ("tv", "tv")):
            assert weighted(part, f"{column}_alone") == pytest.approx(mean[own][name]["mean"], rel=1e-5)
            assert weighted(part, f"{column}_all_but") == pytest.approx(mean[other][name]["mean"], rel=1e-5)
    for label, part in ((ONE, (1, "attention")), (MLP, (2, "mlp")), ("normed", (None, "rest"))):
        for row in rows(table, compressed=label):
            if place(row) == part:
                assert row["kl_all_but"] == row["tv_all_but"] == 0
        assert weighted([row for row in rows(table, compressed=label) if place(row) == part], "kl_alone") == (
            pytest.approx(mean[label]["kl"]["mean"], rel=1e-5)
        )


def test_what_a_drop_does_serves_every_recipe(case: Case) -> None:
    columns = ("prompt_id", "layer_idx", "kl_alone", "tv_alone")
    left, right = (
        [[row[name] for name in columns] for row in rows(case.found.tables["attribution"], compressed=label)]
        for label in (BOTH, ONE)
    )
    assert left == right != []


def test_summary_of_attribution_recomputed(case: Case) -> None:
    order = case.found.info["ranking"]["order"]
    scores = {(entry["layer_idx"], entry["kind"]): entry["score"] for entry in order}
    for record in case.found.summary:
        label, found = record["compressed"], record["attribution"]
        greedy = rows(case.found.tables["steps"], compressed=label, trace="greedy")
        assert found["kl_all"] == pytest.approx(np.mean([row["kl_dense_compressed"] for row in greedy]), rel=1e-12)
        table = rows(case.found.tables["attribution"], compressed=label)
        parts = {place(part): part for part in found["parts"]}
        assert len(parts) == len(found["parts"])
        assert parts.keys() == {place(row) for row in table}
        for where, part in parts.items():
            own = [row for row in table if place(row) == where]
            steps = np.array([float(row["num_steps"]) for row in own])
            for name, column in (("kl", "kl_alone"), ("tv", "tv_alone"), ("kl_all_but", "kl_all_but")):
                if name == "kl_all_but" and not part["changed"]:
                    assert part[name] is None
                    continue
                values = np.array([row[column] for row in own])
                interval = ratio_interval(values * steps, steps, bounded=name == "tv")
                assert part[name]["mean"] == pytest.approx(weighted(own, column), rel=1e-12)
                assert part[name] == {"mean": interval.value, "low": interval.low, "high": interval.high}
                assert part[name]["low"] <= part[name]["mean"] <= part[name]["high"]
            assert part["redundancy"] == scores.get(where)
            assert (part["redundancy"] is None) == (where == (None, "rest"))
        total = sum(part["kl"]["mean"] for part in found["parts"] if part["changed"])
        assert found["sum_alone"] == pytest.approx(total, rel=1e-12)
        assert found["additivity"] == pytest.approx(found["kl_all"] / total, rel=1e-12)
        kinds = {kind for _, kind in parts if [part[1] for part in parts].count(kind) >= 3}
        assert found["rank_correlation"].keys() == kinds
        for kind in kinds:
            own_parts = [part for where, part in parts.items() if where[1] == kind]
            turned = [1 - part["redundancy"] for part in own_parts]
            rho = spearman(turned, [part["kl"]["mean"] for part in own_parts])
            assert found["rank_correlation"][kind] == {"rho": pytest.approx(rho, abs=1e-12), "n": len(own_parts)}


def test_additivity_of_a_single_change_is_one(case: Case) -> None:
    for record in case.found.summary:
        if record["compressed"] in (ONE, THREE, MLP, "normed"):
            assert record["attribution"]["additivity"] == pytest.approx(1, rel=1e-5)


def test_attribution_of_some_models_only() -> None:
    found = looked(dense_model("llama"), BOTH, MLP, attribute=(MLP,), lens_steps=1)
    assert set(found.tables["attribution"]["compressed"].to_pylist()) == {MLP}
    assert [record["attribution"] is None for record in found.summary] == [True, False]


# --- the noise floor ---------------------------------------------------------------------------------------


def test_rows_of_noise(case: Case) -> None:
    table = case.found.tables["noise"]
    every = [(prompt, step) for prompt, length in lengths(case.found).items() for step in range(1, length + 1)]
    for against in ("batch shape", "float64"):
        own = rows(table, against=against)
        assert [(row["prompt_id"], row["step"]) for row in own] == every
        assert {row["trace"] for row in own} == {"greedy"}
        for row in own:
            assert all(row[name] is not None for name in STAT_COLUMNS if not name.startswith("amplification"))
            assert 0 <= row["kl_dense_compressed"] < 1e-9
            assert 0 <= row["tv"] < 1e-5
            assert row["hidden_cosine"] > 1 - 1e-11
            assert row["logit_cosine"] > 1 - 1e-11
            assert row["rank_of_dense_top1"] == 1
    assert any(row["tv"] > 0 for row in rows(table, against="float64"))
    smallest = min(record["kl"]["mean"] for record in case.found.summary)
    assert smallest > 1000 * max(row["kl_dense_compressed"] for row in table.to_pylist())


def test_summary_of_noise_recomputed(case: Case) -> None:
    spreads = case.found.info["noise"]
    assert spreads.keys() == {"batch shape", "float64"}
    for against, found in spreads.items():
        own = rows(case.found.tables["noise"], against=against)
        values = {name: np.array([row[name] for row in own]) for name in ("kl_dense_compressed", "tv")}
        for space, cosine in (("hidden", "hidden_cosine"), ("logit", "logit_cosine"), ("prob", "prob_cosine")):
            values[f"{space}_deviation"] = np.array([1 - row[cosine] for row in own])
        assert found.keys() == values.keys() | {"same_top1"}
        for name, value in values.items():
            ordered = np.sort(value)
            at = 0.95 * (len(ordered) - 1)
            low, high = ordered[int(at)], ordered[int(at) + 1]
            assert found[name] == {
                "mean": pytest.approx(value.mean(), rel=1e-12),
                "p95": pytest.approx(low + (at - int(at)) * (high - low), rel=1e-12),
                "max": value.max(),
            }
        assert found["same_top1"] == {"mean": np.mean([row["same_top1"] for row in own])}


def test_a_coarser_dtype_is_noisier(case: Case) -> None:
    found = looked(dense_model(case.family), MLP, noise_dtype="bfloat16", lens_steps=0).info["noise"]
    assert found["bfloat16"]["kl_dense_compressed"]["mean"] > 100 * found["batch shape"]["kl_dense_compressed"]["max"]
    assert found["bfloat16"]["tv"]["mean"] > 0


def test_a_sample_of_the_noise_floor_is_rows_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other rows share the batch is far below what bfloat16 does."""
    dense = dense_model("llama")
    whole = looked(dense, MLP, noise_dtype="bfloat16", lens_steps=0)
    every = sum(lengths(whole).values())
    assert whole.info["noise_sample"] == {"positions": every, "of": every, "texts": 4, "of_texts": 4}
    monkeypatch.setattr(noise, "MOST_TEXTS", 2)
    monkeypatch.setattr(noise, "MOST_POSITIONS", 6)
    found = looked(dense, MLP, noise_dtype="bfloat16", lens_steps=0)
    assert found.info["noise_sample"] == {"positions": 6, "of": every, "texts": 2, "of_texts": 4}
    for against in ("batch shape", "bfloat16"):
        own = rows(found.tables["noise"], against=against)
        assert len(own) == 6
        assert len({row["prompt_id"] for row in own}) == 2
        for row in own:
            (same,) = rows(whole.tables["noise"], against=against, prompt_id=row["prompt_id"], step=row["step"])
            for name in ("trace", "position", "token_id"):
                assert row[name] == same[name]
            for name in ("entropy_dense", "kl_dense_compressed"):
                assert row[name] == pytest.approx(same[name], rel=0.2, abs=1e-9)


# --- a model against itself, and the way to disk -----------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_model_against_itself_is_exactly_zero_inside(family: str) -> None:
    dense = dense_model(family)
    same = wrap(copy.deepcopy(dense.network), dense.tokenizer, "same")
    found = looked(dense, same, attribute=True, lens="both", lens_steps=3)
    table = found.tables["layers"].to_pylist()
    assert {row["trace"] for row in table} == {"local", "cumulative"}
    for row in table:
        assert_exactly_equal(row)
    assert found.tables["attribution"].num_rows == 0
    assert found.summary[0]["attribution"] is None
    assert found.summary[0]["kl"]["max"] == 0


def test_a_run_comes_back_whole_and_its_page_is_made_again(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = case.found.report(tmp_path / "run")
    back = Comparison.open(tmp_path / "run")
    assert back.tables.keys() == case.found.tables.keys()
    for name, table in case.found.tables.items():
        assert back.tables[name].equals(table), name
    assert back.info == case.found.info
    before = page.read_text(encoding="utf-8")
    assert all(label in before for label in (*DROPPED, *CHECKPOINTS))
    page.write_text("old", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["prunelens", "report", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stopped:
        prunelens.cli.main.main()
    assert stopped.value.code == 0
    after = page.read_text(encoding="utf-8")
    assert abs(len(after) - len(before)) < 0.01 * len(before)
    assert "<html" in after


def test_attribution_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(PrunelensError, match=r"drop-mlp@1.*'typo'"):
        compare(tiny_model(), "drop-mlp@1", prompts=asked(), max_new_tokens=4, attribute=("typo",))
