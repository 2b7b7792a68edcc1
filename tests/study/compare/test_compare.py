"""A whole comparison on tiny models: exact zeros, invariances, the contract of the tables, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import oracle
from conftest import assert_stats, tiny_model, tiny_network, tiny_tokenizer, words
from prunelens.api import compare
from prunelens.errors import PrunelensError
from prunelens.models.opening.loading import wrap
from prunelens.study.compare.schemas import STAT_COLUMNS
from prunelens.tasks.prompts import PromptText

TEXTS = [(5, 9, 33), (4, 90, 17, 60, 61), (20,), (88, 12, 40, 41, 42, 43, 7), (30, 31, 32, 33)]
SETTINGS: dict[str, Any] = {"max_new_tokens": 9, "chat_template": False}

CONTRACT = {
    "prompts": "prompt_id kind text token_ids",
    "steps": "compressed prompt_id trace step position token_id contexts_differ hidden_cosine hidden_alpha hidden_rho "
    "logit_cosine logit_cosine_centered logit_rms_delta logit_var_uniform prob_cosine kl_dense_compressed "
    "kl_compressed_dense js tv same_top1 rank_of_dense_top1 topk_overlap delta_p_top1 delta_p_token entropy_dense "
    "entropy_compressed acceptance prob_deviation_estimate kl_estimate kl_estimate_third trust",
    "prompt_end": "compressed prompt_id space margin prob_cosine kl_dense_compressed logit_cosine hidden_cosine tv",
    "survival": "compressed n survival_sampled survival_sampled_low survival_sampled_high survival_bound "
    "survival_bound_low survival_bound_high survival_greedy survival_greedy_low survival_greedy_high "
    "survival_coupled survival_coupled_low survival_coupled_high",
}


def texts(*which: int) -> list[PromptText]:
    chosen = [TEXTS[index] for index in which] if which else TEXTS
    found = []
    for tokens in chosen:
        options = ("w10", "w11", "w12") if len(tokens) > 3 else ()
        message = {"role": "user", "content": words(*tokens)}
        found.append(PromptText(f"p{tokens[0]}", "text", (message,), options, "w11" if options else None))
    return found


def rows(table: pa.Table, **equal: Any) -> list[dict[str, Any]]:
    return [row for row in table.to_pylist() if all(row[name] == value for name, value in equal.items())]


def test_a_model_against_itself_is_exactly_zero() -> None:
    network = tiny_network("llama")
    dense, same = wrap(network, tiny_tokenizer(), "dense"), wrap(tiny_network("llama"), tiny_tokenizer(), "same")
    found = compare(dense, same, prompts=texts(), **SETTINGS)
    zeros = "hidden_alpha hidden_rho logit_alpha logit_rho logit_rms_delta logit_var_uniform kl_dense_compressed js tv "
    zeros += (
        "kl_compressed_dense delta_p_top1 delta_p_token prob_deviation_estimate kl_estimate kl_estimate_third trust"
    )
    ones = "hidden_cosine logit_cosine logit_cosine_centered prob_cosine same_top1 rank_of_dense_top1 topk_overlap "
    ones += "acceptance"
    for name in ("steps", "prompt_end"):
        for row in found.tables[name].to_pylist():
            assert all(row[column] == 0 for column in zeros.split()), row
            assert all(row[column] == 1 for column in ones.split()), row
            assert row["entropy_dense"] == row["entropy_compressed"]
            assert row["amplification"] is None
    assert not any(row["contexts_differ"] for row in found.tables["steps"].to_pylist())
    for row in found.tables["survival"].to_pylist():
        curves = {name: value for name, value in row.items() if name.startswith("survival")}
        assert all(value == 1 for name, value in curves.items() if not name.endswith("_low"))
        assert all(0 < value < 1 for name, value in curves.items() if name.endswith("_low"))  # few prompts prove little
    (summary,) = found.summary
    assert summary["kl"]["max"] == 0
    assert summary["first_divergent_token"] == {"median": None, "never": 5, "prompts": 5}
    assert "steps.amplification" in found.info["nulls"]


def test_every_row_equals_the_oracle(family: str) -> None:
    dense = tiny_model(family, torch.float64)
    found = compare(dense, "drop-attention@1,3", "drop-block@2", prompts=texts(0, 1), temperature=0.8, **SETTINGS)
    zeroed = {
        "drop-attention@1,3": oracle.zeroed(dense.network, attention=[1, 3]),
        "drop-block@2": oracle.zeroed(dense.network, blocks=[2]),
    }
    for label, compressed in zeroed.items():
        for text in texts(0, 1):
            prompt = rows(found.tables["prompts"], prompt_id=text.prompt_id)[0]
            for trace in ("greedy", "sampled"):
                steps = rows(found.tables["steps"], compressed=label, prompt_id=text.prompt_id, trace=trace)
                written = rows(found.tables["continuations"], model="dense", prompt_id=text.prompt_id, trace=trace)[0]
                tokens = written["token_ids"]
                if trace == "greedy":
                    assert tokens == oracle.greedy(dense.network, prompt["token_ids"], 9, dense.eos_ids)
                expected = oracle.step_rows(dense.network, compressed, prompt["token_ids"], tokens, 0.8)
                assert [row["step"] for row in steps] == list(range(1, len(tokens) + 1))
                for step, row in zip(steps, expected, strict=True):
                    wanted = {name: row[name] for name in (*STAT_COLUMNS, "position", "token_id")}
                    assert_stats({name: np.array([step[name]]) for name in wanted}, 0, wanted, 1e-8)
                    assert not step["contexts_differ"]


def test_free_running_rows_equal_the_oracle() -> None:
    dense = tiny_model("qwen2", torch.float64)
    found = compare(dense, "drop-attention@1", prompts=texts(), **SETTINGS)
    compressed = oracle.zeroed(dense.network, attention=[1])
    differed = 0
    for prompt in found.tables["prompts"].to_pylist():
        own = oracle.greedy(compressed, prompt["token_ids"], 9, dense.eos_ids)
        text = oracle.greedy(dense.network, prompt["token_ids"], 9, dense.eos_ids)
        key = prompt["prompt_id"]
        assert rows(found.tables["continuations"], model="drop-attention@1", prompt_id=key)[0]["token_ids"] == own
        steps = rows(found.tables["steps"], prompt_id=key, trace="free")
        assert len(steps) == min(len(text), len(own))
        for step, row in enumerate(steps):
            left = oracle._last_position(dense.network, prompt["token_ids"] + text[:step])
            right = oracle._last_position(compressed, prompt["token_ids"] + own[:step])
            expected = oracle.vector_stats(left[0], right[0]) | oracle.logit_stats(left[1], right[1], 1.0, text[step])
            assert_stats({name: np.array([row[name]]) for name in expected}, 0, expected, 1e-8)
            assert row["contexts_differ"] == (text[:step] != own[:step])
            differed += row["contexts_differ"]
    assert differed


def test_prompt_end_equals_the_oracle() -> None:
    dense = tiny_model("llama", torch.float64)
    found = compare(dense, "drop-mlp@2", prompts=texts(), temperature=1.3, **SETTINGS).tables
    compressed = oracle.zeroed(dense.network, mlp=[2])
    options = 0
    for prompt in found["prompts"].to_pylist():
        left = oracle._last_position(dense.network, prompt["token_ids"])
        right = oracle._last_position(compressed, prompt["token_ids"])
        (whole,) = rows(found["prompt_end"], prompt_id=prompt["prompt_id"], space="vocabulary")
        expected = oracle.logit_stats(left[1], right[1], 1.3, whole["token_id"])
        assert_stats({name: np.array([whole[name]]) for name in expected}, 0, expected, 1e-8)
        best = np.sort(left[1])
        assert whole["margin"] == pytest.approx(best[-1] - best[-2])
        if prompt["options"]:
            options += 1
            assert prompt["option_ids"] == [10, 11, 12]
            (part,) = rows(found["prompt_end"], prompt_id=prompt["prompt_id"], space="options")
            assert part["token_id"] == 11
            expected = oracle.option_stats(left[1], right[1], [10, 11, 12], 1.3, 1)
            assert_stats({name: np.array([part[name]]) for name in expected}, 0, expected, 1e-8)
            assert part["hidden_rho"] == whole["hidden_rho"]
    assert options == 3


def test_survival_equals_the_oracle() -> None:
    dense = tiny_model("gpt2", torch.float64)
    found = compare(dense, "drop-attention@2", prompts=texts(), **SETTINGS).tables
    compressed = oracle.zeroed(dense.network, attention=[2])
    steps: dict[str, list[list[dict[str, Any]]]] = {"sampled": [], "greedy": []}
    for prompt in found["prompts"].to_pylist():
        for trace, collected in steps.items():
            (text,) = rows(found["continuations"], model="dense", prompt_id=prompt["prompt_id"], trace=trace)
            collected.append(oracle.step_rows(dense.network, compressed, prompt["token_ids"], text["token_ids"], 1.0))
    sampled, greedy = (oracle.survival(steps[trace], 9) for trace in ("sampled", "greedy"))
    table = found["survival"].to_pydict()
    assert np.allclose(table["survival_sampled"], sampled["sampled"], rtol=1e-9)
    assert np.allclose(table["survival_bound"], sampled["bound"], rtol=1e-9)
    assert np.allclose(table["survival_greedy"], greedy["greedy"])
    assert table["survival_free"] == table["survival_greedy"]
    for curve in ("sampled", "bound", "greedy", "coupled", "free"):
        low, mean, high = (np.array(table[f"survival_{curve}{end}"]) for end in ("_low", "", "_high"))
        assert ((low >= 0) & (low <= mean) & (mean <= high) & (high <= 1)).all()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_and_order_of_prompts_change_nothing(batch_size: int) -> None:
    dense = tiny_model("llama", torch.float64)
    recipes = ("drop-attention:2", "drop-mlp:1")
    whole = compare(dense, *recipes, prompts=texts(), **SETTINGS)
    other = compare(dense, *recipes, prompts=texts(3, 0, 4, 2, 1), batch_size=batch_size, **SETTINGS)
    assert [found["dropped"] for found in whole.info["compressed"]] == [
        found["dropped"] for found in other.info["compressed"]
    ]
    keys = [("compressed", "ascending"), ("prompt_id", "ascending"), ("trace", "ascending"), ("step", "ascending")]
    left, right = (found.tables["steps"].sort_by(keys) for found in (whole, other))
    for name in left.schema.names:
        if name in STAT_COLUMNS and pa.types.is_floating(left.schema.field(name).type):
            one, two = (table[name].to_numpy(zero_copy_only=False) for table in (left, right))
            assert np.allclose(one, two, rtol=1e-7, atol=1e-13, equal_nan=True), name
        else:
            assert left[name].to_pylist() == right[name].to_pylist(), name
    for name in ("survival_sampled", "survival_bound", "survival_greedy", "survival_coupled", "survival_free"):
        one, two = (found.tables["survival"][name].to_numpy() for found in (whole, other))
        assert np.allclose(one, two, rtol=1e-9), name


def test_another_model_equals_the_same_drop() -> None:
    """A checkpoint whose projections are zero, and the recipe that drops them, give the same rows."""
    dense = tiny_model("llama", torch.float64)
    zeroed = wrap(oracle.zeroed(dense.network, attention=[2]), tiny_tokenizer(), "zeroed")
    found = compare(dense, "drop-attention@2", zeroed, prompts=texts(), **SETTINGS).tables["steps"]
    left, right = rows(found, compressed="drop-attention@2"), rows(found, compressed="zeroed")
    assert len(left) == len(right) > 0
    for one, two in zip(left, right, strict=True):
        assert one["kl_dense_compressed"] == pytest.approx(two["kl_dense_compressed"], rel=1e-9)
        assert one["token_id"] == two["token_id"]


def test_tables_hold_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read with pyarrow alone."""
    monkeypatch.setattr("prunelens.report.pages.compare.render_page", lambda run: "<p>page</p>")
    found = compare(tiny_model(), "drop-attention:1", prompts=texts(), **SETTINGS)
    found.report(tmp_path / "run")
    for name, columns in CONTRACT.items():
        table = pq.read_table(tmp_path / "run" / f"{name}.parquet")
        assert set(columns.split()) <= set(table.schema.names)
        assert table.num_rows > 0
    steps = pq.read_table(tmp_path / "run" / "steps.parquet")
    assert set(steps["trace"].to_pylist()) == {"greedy", "sampled", "free"}
    assert set(steps["compressed"].to_pylist()) == {"drop-attention:1"}
    ends = pq.read_table(tmp_path / "run" / "prompt_end.parquet")
    assert set(ends["space"].to_pylist()) == {"vocabulary", "options"}
    survival = pq.read_table(tmp_path / "run" / "survival.parquet")
    assert survival["n"].to_pylist() == list(range(1, 10))


def test_ranking_is_part_of_the_result() -> None:
    found = compare(tiny_model(), "drop-sublayers:3", prompts=texts(), **SETTINGS).info
    order = found["ranking"]["order"]
    assert len(order) == 12
    assert [entry["score"] for entry in order] == sorted((entry["score"] for entry in order), reverse=True)
    best = [entry for entry in order if entry["kind"] != "block"][:3]
    dropped = found["compressed"][0]["dropped"]
    assert {(kind, layer) for kind, layers in dropped.items() for layer in layers} == {
        (entry["kind"], entry["layer_idx"]) for entry in best
    }


def test_parts_are_put_back() -> None:
    dense = tiny_model()
    ids = torch.randint(3, 97, (1, 6))
    before = dense.network(ids).logits
    compare(dense, "drop-block:2", prompts=texts(0), **SETTINGS)
    assert torch.equal(dense.network(ids).logits, before)


def test_one_token_and_one_prompt() -> None:
    found = compare(tiny_model(), "drop-attention:1", prompts=texts(2), max_new_tokens=1, chat_template=False)
    assert found.tables["survival"].num_rows == 1
    assert found.summary[0]["survival"] == {}


def test_overflowing_logits_are_reported() -> None:
    dense = tiny_model()
    broken = wrap(tiny_network("llama"), tiny_tokenizer(), "broken")
    broken.network.model.norm.weight.data.mul_(3e38)
    with pytest.raises(PrunelensError, match="NaN or infinite"):
        compare(dense, broken, prompts=texts(0), **SETTINGS)
