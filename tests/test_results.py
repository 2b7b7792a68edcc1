"""Results by attribute: typed records that say what the tables and run.json say."""

from pathlib import Path

import pytest

import prunelens
from conftest import tiny_model
from prunelens import Comparison, PrunelensError
from prunelens.study.rows import rows_of

RECIPES = ("drop-attention:1", "drop-mlp@2")


@pytest.fixture(scope="module")
def found() -> Comparison:
    return prunelens.compare(tiny_model(), *RECIPES, max_new_tokens=12, batch_size=64)


@pytest.mark.parametrize("label", RECIPES)
def test_a_compressed_model_by_its_label(found: Comparison, label: str) -> None:
    model, record = found[label], next(one for one in found.summary if one["compressed"] == label)
    rows = rows_of(found.tables["survival"], compressed=label).to_pylist()
    assert sorted(model.survival) == list(range(1, 13))
    for row in rows:
        point = model.survival[row["n"]]
        assert (point.value, point.low, point.high) == tuple(
            row[f"survival_sampled{end}"] for end in ("", "_low", "_high")
        )
        assert point.bound == row["survival_bound"]
    assert model.survival[8].low == record["survival"]["8"]["low"]
    assert (model.kl.mean, model.kl.low, model.kl.p95) == tuple(record["kl"][name] for name in ("mean", "low", "p95"))
    assert model.faithful_length.median == record["faithful_length"]["median"]
    assert model.size.bytes == record["size"]["bytes"]
    assert 0 < model.survival[12].value < model.survival[1].value < 1


def test_iteration_follows_the_order_given(found: Comparison) -> None:
    assert [model.compressed for model in found] == list(RECIPES)


def test_an_unknown_label_names_the_nearest(found: Comparison) -> None:
    with pytest.raises(
        PrunelensError, match=r"drop-attention:1, drop-mlp@2, found 'drop-atention:1'.*did you mean drop-at"
    ):
        found["drop-atention:1"]


def test_a_stored_comparison_says_the_same(found: Comparison, tmp_path: Path) -> None:
    found.report(tmp_path / "run")
    again = Comparison.open(tmp_path / "run")
    assert [model.model_dump() for model in again] == [model.model_dump() for model in found]


def test_an_evaluated_model_by_its_label() -> None:
    found = prunelens.evaluate(tiny_model(), *RECIPES, tasks="core_choice", limit=8)
    model, record = found["drop-mlp@2"], found.summary[1]
    assert [score.metric for score in model.scores] == [row["metric"] for row in record["scores"]]
    assert model.scores[0].dense.mean == record["scores"][0]["dense"]["mean"]
    line = next(one for one in record["verdicts"] if one["use"] == "multiple-choice")
    assert model.verdict("multiple-choice").verdict == line["verdict"]
    assert [one.compressed for one in found] == list(RECIPES)
    with pytest.raises(PrunelensError, match="did you mean multiple-choice"):
        model.verdict("multiple-choise")


def test_inspect_takes_a_model_or_its_name(tmp_path: Path) -> None:
    model = tiny_model()
    model.network.save_pretrained(tmp_path / "tiny")
    model.tokenizer.save_pretrained(tmp_path / "tiny")
    opened, named = prunelens.inspect(model), prunelens.inspect(tmp_path / "tiny")
    assert opened["blocks"] == named["blocks"]
    assert len(opened["blocks"]) == len(model.anatomy.blocks)


def test_benchmark_and_prune_take_a_name(tmp_path: Path) -> None:
    model = tiny_model()
    model.network.save_pretrained(tmp_path / "tiny")
    model.tokenizer.save_pretrained(tmp_path / "tiny")
    speeds = prunelens.benchmark(str(tmp_path / "tiny"), "drop-block@1", context=8, new_tokens=2, repeats=2)
    assert [speed.label for speed in speeds] == ["dense", "drop-block@1"]
    (tmp_path / "x.txt").write_text("one text\n", encoding="utf-8")
    made = prunelens.prune(str(tmp_path / "tiny"), "wanda:0.5", tmp_path / "small", calibration=str(tmp_path / "x.txt"))
    assert made.sparsity == pytest.approx(0.5, abs=0.02)
    with pytest.raises(PrunelensError, match="did you mean repeats"):
        prunelens.benchmark(model, "drop-block@1", repeat=2)
    with pytest.raises(PrunelensError, match="nowhere"):
        prunelens.prune(str(tmp_path / "nowhere"), "drop-mlp@1", tmp_path / "other")
