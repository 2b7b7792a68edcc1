"""The real model: every quantity against the oracle, the forecast against free running, the command line."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import layer_oracle
import oracle
from conftest import assert_stats
from prunelens.api import compare
from prunelens.cli import main as cli
from prunelens.metrics.head import Pair, stream_pairs
from prunelens.metrics.survival import agreed_length, common_prefix
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.variant import Variant
from prunelens.results import Comparison
from prunelens.tasks.encoding import encode
from prunelens.tasks.prompts import prompts
from prunelens.tracing.attribution import Attribution
from prunelens.tracing.forced import Trajectory, forced_states
from prunelens.tracing.generate import Greedy, write
from prunelens.tracing.layers import trace_layers

RECIPE = "drop-attention@25,26"
STEPS = 6
LENGTH = 12
"""New tokens of the texts on all core prompts."""
EXACT = "same_top1 rank_of_dense_top1 topk_overlap step position token_id p_token q_token".split()


@pytest.fixture(scope="module")
def trajectories(smollm2: Model) -> list[Trajectory]:
    """Short greedy texts of the model on two prompts."""
    asked = encode(prompts(limit=5)[::4], smollm2, chat_template=True, max_new_tokens=STEPS)
    ids = [list(prompt.token_ids) for prompt in asked]
    written = write(smollm2, ids, [Greedy() for _ in ids], STEPS, batch_size=2)
    return [
        Trajectory(index, "greedy", tuple(prompt), tuple(text.token_ids), text.ended)
        for index, (prompt, text) in enumerate(zip(ids, written, strict=True))
    ]


@pytest.fixture(scope="module")
def expected(smollm2: Model, trajectories: list[Trajectory]) -> list[dict[str, Any]]:
    """The oracle's rows: both models in float64, from scratch on growing prefixes."""
    dense = copy.deepcopy(smollm2.network).double()
    compressed = oracle.zeroed(dense, attention=[25, 26])
    return [
        row
        for trajectory in trajectories
        for row in oracle.step_rows(dense, compressed, trajectory.prompt_ids, trajectory.token_ids, 1.0)
    ]


def measured(model: Model, trajectories: list[Trajectory]) -> dict[str, torch.Tensor]:
    from prunelens.pruning.apply import apply
    from prunelens.pruning.recipe import parse_recipe

    states, own = forced_states(model, trajectories, [apply(parse_recipe(RECIPE), model).drop])
    tokens = torch.tensor([token for trajectory in trajectories for token in trajectory.token_ids])
    return stream_pairs(states, model.head, [Pair(own, model.head)], tokens, 1.0)[0]


def test_float64_equals_the_oracle(
    smollm2: Model, trajectories: list[Trajectory], expected: list[dict[str, Any]]
) -> None:
    model = wrap(copy.deepcopy(smollm2.network).double(), smollm2.tokenizer)
    found = measured(model, trajectories)
    for index, row in enumerate(expected):
        assert_stats(found, index, {name: value for name, value in row.items() if name in found}, 1e-8)


def test_float32_is_close_to_the_oracle(
    smollm2: Model, trajectories: list[Trajectory], expected: list[dict[str, Any]]
) -> None:
    found = measured(smollm2, trajectories)
    for index, row in enumerate(expected):
        for name, value in row.items():
            if name in found and name not in EXACT:
                assert found[name][index].item() == pytest.approx(value, rel=2e-3, abs=1e-5), name
    kl = np.array([row["kl_dense_compressed"] for row in expected])
    assert found["kl_dense_compressed"].mean().item() == pytest.approx(kl.mean(), rel=1e-3)


@pytest.fixture(scope="module")
def run(smollm2: Model) -> Comparison:
    """All core prompts, short texts."""
    return compare(smollm2, RECIPE, max_new_tokens=LENGTH)


def test_coupling_lands_inside_the_forecast(run: Comparison) -> None:
    """S3' against S4: couplings drawn step by step, and S(n), both from what was read."""
    coupling = run.summary[0]["coupling"]
    predicted = coupling["predicted"]
    assert predicted["low"] <= coupling["measured"] <= predicted["high"]
    coupled = np.array(run.tables["survival"]["survival_coupled"].to_pylist())
    assert coupled.sum() == pytest.approx(coupling["measured"])


def test_no_coupling_exceeds_the_bound(run: Comparison) -> None:
    """S2': the plain product of acceptances, text by text, stays below min(1, Π p'/p)."""
    steps = [row for row in run.tables["steps"].to_pylist() if row["trace"] == "sampled"]
    products = []
    for prompt in run.tables["prompts"]["prompt_id"].to_pylist():
        accepted = np.array([row["acceptance"] for row in steps if row["prompt_id"] == prompt])
        products.append(np.pad(np.cumprod(accepted), (0, LENGTH - len(accepted)), mode="edge"))
    bound = np.array(run.tables["survival"]["survival_bound"].to_pylist())
    assert (np.mean(products, axis=0) <= bound + 1e-12).all()


def test_free_greedy_agreement_equals_the_forecast_on_every_prompt(run: Comparison) -> None:
    """S3, recomputed here from the tables; prompts where rounding decides are named in the summary."""
    steps = run.tables["steps"].to_pylist()
    ties = {tie["prompt_id"] for tie in run.summary[0]["greedy_check"]["ties"]}
    texts = {
        (row["model"], row["prompt_id"]): row["token_ids"]
        for row in run.tables["continuations"].to_pylist()
        if row["trace"] == "greedy"
    }
    checked = 0
    for prompt in run.tables["prompts"]["prompt_id"].to_pylist():
        same = [row["same_top1"] for row in steps if row["prompt_id"] == prompt and row["trace"] == "greedy"]
        predicted = agreed_length(same, LENGTH)
        found = common_prefix(texts["dense", prompt], texts[RECIPE, prompt], LENGTH)
        if prompt not in ties:
            assert predicted == found, prompt
            checked += 1
    assert checked >= 44
    assert not run.summary[0]["greedy_check"]["unexplained"]


def test_theorems_bound_the_real_steps(run: Comparison) -> None:
    """T3 is a good estimate exactly where its trust region says so."""
    steps = run.tables["steps"].to_pydict()
    kl, estimate, trust, trace = (
        np.array(steps[name]) for name in ("kl_dense_compressed", "kl_estimate", "trust", "trace")
    )
    forced = (trace != "free") & (kl > 1e-9)
    error = abs(estimate / kl - 1)
    trusted, rest = forced & (trust < 0.05), forced & (trust > 0.5)
    assert trusted.sum() > 50
    assert np.median(error[trusted]) < 0.05 < np.median(error[rest])


def test_command_line_writes_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked.jsonl"
    records = [
        {"prompt": "Name three colours.", "id": "colours"},
        {"messages": [{"role": "user", "content": "2 + 2 = ? A. 3 B. 4"}], "options": ["A", "B"], "answer": "B"},
    ]
    asked.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    out = tmp_path / "run"
    arguments = ["compare", "smollm2", RECIPE, "--prompts", str(asked), "--json", "-o", str(out)]
    monkeypatch.setattr("sys.argv", ["prunelens", *arguments, "--max-new-tokens", "6"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["run"] == str(out)
    assert answer["summary"][0]["compressed"] == RECIPE
    steps = pq.read_table(out / "steps.parquet")
    assert set(steps["prompt_id"].to_pylist()) == {"colours", "line-2"}
    assert pq.read_table(out / "prompt_end.parquet").num_rows == 3
    assert (out / "report.html").stat().st_size > 1_000_000


# --- sublayers ---------------------------------------------------------------------------------------------

GATE = "model.layers.12.mlp.gate_proj.weight"
SAMPLED = [1, 4]
ALONE = {(12, "mlp"), (25, "attention")}
LENSES = ("normed",)
Rows = dict[tuple[Any, ...], dict[str, Any]]


@pytest.fixture(scope="module")
def short(smollm2: Model) -> Trajectory:
    """A few greedy tokens after a few words."""
    ids = smollm2.tokenizer("The capital of France is").input_ids
    (text,) = write(smollm2, [ids], [Greedy()], SAMPLED[-1], batch_size=1)
    return Trajectory(0, "greedy", tuple(ids), tuple(text.token_ids), text.ended)


@pytest.fixture(scope="module")
def double(smollm2: Model) -> Model:
    return wrap(copy.deepcopy(smollm2.network).double(), smollm2.tokenizer, "double")


@pytest.fixture(scope="module")
def perturbed(smollm2: Model) -> Model:
    """One weight matrix changed, float32."""
    return wrap(layer_oracle.perturb(smollm2.network, GATE, 0.3), smollm2.tokenizer, "perturbed")


@pytest.fixture(scope="module")
def sublayers_expected(double: Model, perturbed: Model, short: Trajectory) -> Rows:
    """The oracle's rows of a few sublayers, from whole networks in float64; those are not copied once more."""
    dense, other = double.network, copy.deepcopy(perturbed.network).double()
    found: Rows = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_oracle, "float64", lambda network: network)
        for lens in LENSES:
            arguments = (short.prompt_ids, short.token_ids, SAMPLED, 1.0, lens)
            traces = {
                ("dropped", "dense"): layer_oracle.local(dense, ALONE, *arguments, only=ALONE),
                ("local", "perturbed"): layer_oracle.local(dense, other, *arguments, only={(12, "mlp")}),
            }
            found |= {
                (*trace, lens, part, step): row
                for trace, parts in traces.items()
                for part, stats in parts.items()
                for step, row in zip(SAMPLED, stats, strict=True)
            }
    return found


@pytest.fixture(scope="module")
def sublayers_found(smollm2: Model, perturbed: Model, short: Trajectory) -> Rows:
    return sublayers_measured(smollm2, perturbed, short)


def sublayers_measured(dense: Model, perturbed: Model, text: Trajectory) -> Rows:
    variants = {RECIPE: Variant(dense, Drop(attention=frozenset([25, 26]))), "perturbed": Variant(perturbed)}
    found: Rows = {}
    for rows in trace_layers(dense, variants, [text], LENSES, SAMPLED):
        places = [(part, step) for part in rows.sublayers for _, step in rows.steps]
        for number, (part, step) in enumerate(places):
            values = {name: value[number].item() for name, value in rows.stats.items() if value.ndim == 1}
            found[rows.trace, rows.label, rows.lens, part, step] = values
    return found


def test_sublayers_in_float64_equal_the_oracle(
    double: Model, perturbed: Model, short: Trajectory, sublayers_expected: Rows
) -> None:
    other = wrap(copy.deepcopy(perturbed.network).double(), double.tokenizer)
    found = sublayers_measured(double, other, short)
    assert len(sublayers_expected) == len(SAMPLED) * len(LENSES) * 3
    for key, row in sublayers_expected.items():
        values = {name: torch.tensor([value]) for name, value in found[key].items()}
        assert_stats(values, 0, {name: value for name, value in row.items() if name in values}, 1e-6)


def test_sublayers_in_float32_are_close_to_the_oracle(sublayers_found: Rows, sublayers_expected: Rows) -> None:
    for key, row in sublayers_expected.items():
        for name, value in row.items():
            if name in sublayers_found[key] and name not in EXACT:
                assert sublayers_found[key][name] == pytest.approx(value, rel=2e-3, abs=1e-5), (key, name)


def test_unchanged_sublayers_are_exactly_zero(sublayers_found: Rows) -> None:
    unchanged = 0
    for (trace, label, _, part, _), row in sublayers_found.items():
        before = trace == "cumulative" and part < ((12, "mlp") if label == "perturbed" else (25, "attention"))
        if before or (trace == "local" and part != (12, "mlp")):
            unchanged += 1
            zeros = [row[name] for name in ("kl_dense_compressed", "tv", "hidden_rho", "logit_rho") if name in row]
            assert set(zeros) == {0}
            assert row["hidden_cosine"] == row.get("prob_cosine", 1) == 1
        elif "tv" in row:
            assert row["kl_dense_compressed"] > 0
    assert unchanged > 59 * len(SAMPLED)


def test_attribution_equals_each_compression_run_in_full(smollm2: Model, perturbed: Model, short: Trajectory) -> None:
    trajectories = [short, replace(short, prompt_ids=short.prompt_ids[2:], token_ids=short.token_ids[:2])]
    variants = {RECIPE: Variant(smollm2, Drop(attention=frozenset([25, 26]))), "perturbed": Variant(perturbed)}
    found = Attribution(smollm2, variants).run(trajectories)
    assert list(found[RECIPE]) == [("attention", layer_idx) for layer_idx in range(30)]
    assert list(found["perturbed"]) == [("mlp", 12)]

    alone = [0, 7, 18, 25, 26, 29]
    drops = [Drop(attention=frozenset([layer_idx])) for layer_idx in alone]
    states, *own = forced_states(smollm2, trajectories, drops)
    own.append(forced_states(perturbed, trajectories)[0])
    heads = [*[smollm2.head] * len(alone), perturbed.head]
    tokens = torch.tensor([token for trajectory in trajectories for token in trajectory.token_ids])
    lengths = [len(trajectory.token_ids) for trajectory in trajectories]
    pairs = [Pair(*pair) for pair in zip(own, heads, strict=True)]
    stats = stream_pairs(states, smollm2.head, pairs, tokens, 1.0)
    means = [
        {
            column: [float(part.double().sum()) / len(part) for part in each[name].split(lengths)]
            for column, name in (("kl", "kl_dense_compressed"), ("tv", "tv"))
        }
        for each in stats
    ]
    whole = dict(zip(alone, means, strict=False))
    for layer_idx in alone:
        damage = found[RECIPE]["attention", layer_idx]
        assert damage.changed == (layer_idx in (25, 26))
        for column, expected in whole[layer_idx].items():
            assert getattr(damage, f"{column}_alone").tolist() == pytest.approx(expected, rel=1e-5)
    for layer_idx, other in ((25, 26), (26, 25)):
        damage = found[RECIPE]["attention", layer_idx]
        assert damage.kl_all_but.tolist() == pytest.approx(whole[other]["kl"], rel=1e-5)
        assert damage.tv_all_but.tolist() == pytest.approx(whole[other]["tv"], rel=1e-5)
    (damage,) = found["perturbed"].values()
    assert damage.kl_alone.tolist() == pytest.approx(means[-1]["kl"], rel=1e-5)
    assert damage.kl_all_but.tolist() == [0, 0]
