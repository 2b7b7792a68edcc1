"""L1 and L2 against a naive float64 oracle that swaps sublayers in whole networks, and their invariants."""

import copy
from typing import Any

import pytest
import torch

import layer_oracle
from conftest import assert_stats, tiny_model
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import NOTHING, Drop
from prunelens.models.surgery.variant import Variant
from prunelens.study.compare.schemas import STAT_COLUMNS
from prunelens.tracing.forced import Trajectory
from prunelens.tracing.layers import LayerRows, even_steps, trace_layers
from prunelens.tracing.lens import Lens

TRAJECTORIES = [
    Trajectory(0, "greedy", (5, 9, 33), (71, 8, 8, 15), False),
    Trajectory(1, "greedy", (4, 90, 17, 3, 60), (61, 62), True),
]
STEPS = [1, 3]
DROP = Drop(attention=frozenset([1]), mlp=frozenset([3]))
DROPPED = {(1, "attention"), (3, "mlp")}
ALL = ("normed", "raw")


def layer_rows(dense: Model, variants: dict[str, Variant], lenses: tuple[str, ...] = ALL, **more: Any) -> dict:
    """{(trace, label, lens, (layer_idx, sublayer), trajectory, step): {column: value}}."""
    found = {}
    for rows in trace_layers(dense, variants, TRAJECTORIES, lenses, STEPS, **more):
        places = [(part, *step) for part in rows.sublayers for step in rows.steps]
        for number, place in enumerate(places):
            row = {name: values[number].item() for name, values in rows.stats.items() if values.ndim == 1}
            key = (rows.trace, rows.label, rows.lens, *place)
            assert key not in found
            found[key] = row
    return found


def changed_model(model: Model, *parts: tuple[int, str]) -> Model:
    """A model in which these sublayers have other weights."""
    network = copy.deepcopy(model.network)
    for number, (layer_idx, sublayer) in enumerate(parts):
        network = layer_oracle.perturb_sublayer(network, layer_idx, sublayer, 0.1, seed=number)
    return wrap(network, model.tokenizer, "changed")


def expect(found: dict, trace: str, label: str, lens: str, expected: dict, index: int) -> None:
    assert expected
    for part, rows in expected.items():
        steps = [step for step in STEPS if step <= len(TRAJECTORIES[index].token_ids)]
        for step, stats in zip(steps, rows, strict=True):
            row = found[trace, label, lens, part, index, step]
            assert_stats({name: [torch.tensor(value)] for name, value in row.items()}, 0, stats, 1e-7)


def oracle_arguments(index: int) -> tuple:
    text = TRAJECTORIES[index]
    steps = [step for step in STEPS if step <= len(text.token_ids)]
    return text.prompt_ids, text.token_ids, steps, 0.7


@pytest.fixture(params=["llama", "gpt2", "granite", "gemma2", "olmo2", "gpt_neox", "bloom"])
def layered(request: pytest.FixtureRequest) -> Model:
    """One family of each layout: plain, Conv1D, multiplied, sandwich, post-norm, parallel, residual inside."""
    return tiny_model(request.param, torch.float64)


def test_dropped_sublayers_equal_oracle(layered: Model) -> None:
    found = layer_rows(layered, {"drop": Variant(layered, DROP)}, temperature=0.7)
    every = set(layer_oracle.sublayers(layered.network))
    for lens in ALL:
        for index in range(len(TRAJECTORIES)):
            arguments = (*oracle_arguments(index), lens)
            expected = layer_oracle.local(layered.network, every, *arguments)
            expect(found, "dropped", "dense", lens, expected, index)
            expected = layer_oracle.cumulative(layered.network, DROPPED, *arguments)
            expect(found, "cumulative", "drop", lens, expected, index)


def test_changed_weights_equal_oracle(layered: Model) -> None:
    other = changed_model(layered, (1, "attention"), (2, "mlp"))
    found = layer_rows(layered, {"other": Variant(other)}, temperature=0.7)
    assert not any(trace == "dropped" for trace, *_ in found)
    for lens in ALL:
        for index in range(len(TRAJECTORIES)):
            arguments = (*oracle_arguments(index), lens)
            expected = layer_oracle.local(layered.network, other.network, *arguments)
            expect(found, "local", "other", lens, expected, index)
            expected = layer_oracle.cumulative(layered.network, other.network, *arguments)
            expect(found, "cumulative", "other", lens, expected, index)


IDENTICAL = {"hidden_cosine": 1, "logit_cosine": 1, "prob_cosine": 1, "kl_dense_compressed": 0, "tv": 0, "js": 0}


def test_an_unchanged_sublayer_is_exactly_zero(family: str) -> None:
    model = tiny_model(family)
    found = layer_rows(model, {"other": Variant(changed_model(model, (2, "mlp"))), "same": Variant(model, NOTHING)})
    for (trace, label, _, part, *_), row in found.items():
        untouched = trace != "dropped" and (
            label == "same" or part < (2, "mlp") or (trace == "local" and part != (2, "mlp"))
        )
        if untouched:
            assert {name: row[name] for name in IDENTICAL if name in row} == {
                name: value for name, value in IDENTICAL.items() if name in row
            }
    assert found["local", "other", "normed", (2, "mlp"), 0, 1]["kl_dense_compressed"] > 0


def test_skipped_comparison_has_the_same_columns_as_a_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(Lens, "equals", lambda own, other: False)
    (skipped,) = _rows(model, Variant(model, Drop(mlp=frozenset([3]))), "cumulative", "normed")
    (real,) = _rows(model, Variant(wrap(copy.deepcopy(model.network))), "cumulative", "normed")
    num_steps = len(skipped.steps)
    for name in STAT_COLUMNS:
        left, right = (rows.stats[name][: 7 * num_steps] for rows in (skipped, real))
        assert left.dtype == right.dtype
        torch.testing.assert_close(left, right, equal_nan=True, rtol=1e-6, atol=1e-6)


def _rows(model: Model, variant: Variant, trace: str, lens: str) -> list[LayerRows]:
    found = trace_layers(model, {"it": variant}, TRAJECTORIES, ALL, STEPS)
    return [rows for rows in found if (rows.trace, rows.lens) == (trace, lens) and "tv" in rows.stats]


@pytest.mark.parametrize("batch_tokens", [1, 7])
def test_batches_change_nothing(batch_tokens: int) -> None:
    model = tiny_model("qwen3", torch.float64)
    variants = {"drop": Variant(model, DROP), "block": Variant(model, Drop(block=frozenset([2])))}
    whole, parts = layer_rows(model, variants), layer_rows(model, variants, batch_tokens=batch_tokens)
    assert whole.keys() == parts.keys()
    for key, row in whole.items():
        assert row == pytest.approx(parts[key], rel=1e-9, abs=1e-12, nan_ok=True), key


def test_the_last_depth_is_the_head() -> None:
    """L2 behind the last sublayer, through the norm, is L3 at these steps."""
    from prunelens.metrics.head import Pair, stream_pairs
    from prunelens.tracing.forced import forced_states

    model = tiny_model("llama", torch.float64)
    found = layer_rows(model, {"drop": Variant(model, DROP)})
    states = forced_states(model, TRAJECTORIES, [DROP])
    tokens = torch.tensor([token for trajectory in TRAJECTORIES for token in trajectory.token_ids])
    stats = stream_pairs(states[0], model.head, [Pair(states[1], model.head)], tokens, 1.0)[0]
    for row, key in ((0, (0, 1)), (2, (0, 3)), (4, (1, 1))):
        own = found["cumulative", "drop", "normed", (3, "mlp"), *key]
        assert own["kl_dense_compressed"] == pytest.approx(stats["kl_dense_compressed"][row].item(), rel=1e-9)
        assert own["hidden_cosine"] == pytest.approx(stats["hidden_cosine"][row].item(), rel=1e-12)


def test_hidden_states_of_all_steps() -> None:
    model = tiny_model()
    found = layer_rows(model, {"drop": Variant(model, DROP)}, lenses=("normed",))
    raw = {key for key in found if key[0] == "cumulative" and key[2] == "raw"}
    assert len(raw) == 8 * 6
    assert all(set(found[key]) == {"hidden_cosine", "hidden_alpha", "hidden_rho"} for key in raw)
    both = layer_rows(model, {"drop": Variant(model, DROP)})
    for key in raw:
        assert both[key]["hidden_cosine"] == found[key]["hidden_cosine"]


def test_even_steps() -> None:
    assert even_steps(48, 8) == [1, 8, 14, 21, 28, 35, 41, 48]
    assert even_steps(5, 8) == [1, 2, 3, 4, 5]
    assert even_steps(9, 1) == [1]


def test_two_lenses_are_equal_where_norm_head_and_scaling_are() -> None:
    model = tiny_model("granite")
    same, scaled, normed = (wrap(copy.deepcopy(model.network)) for _ in range(3))
    scaled.network.config.logits_scaling = scaled.network.logits_scaling = 2.0
    normed.network.model.norm.weight.data[3] *= 1.01
    assert Lens(same, "normed").equals(Lens(model, "normed"))
    assert not Lens(scaled, "normed").equals(Lens(model, "normed"))
    assert not Lens(normed, "normed").equals(Lens(model, "normed"))
    assert Lens(normed, "raw").equals(Lens(model, "raw"))


@pytest.mark.parametrize("twins", [1, 3])
def test_streams_joined_in_one_head_product_change_nothing(twins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one row, of a few, and whole, with one and with several compressed models."""
    model = tiny_model("llama", torch.float64)
    parts = [(1, "attention"), (2, "mlp"), (3, "attention")]
    variants = {f"other{number}": Variant(changed_model(model, parts[number])) for number in range(twins)}
    variants["drop"] = Variant(model, DROP)
    whole = layer_rows(model, variants)
    for rows in (1, 3):
        monkeypatch.setattr("prunelens.tracing.lens.rows_per_chunk", lambda num_tokens, device, rows=rows: rows)
        found = layer_rows(model, variants)
        assert found.keys() == whole.keys()
        for key, row in whole.items():
            assert row == pytest.approx(found[key], rel=1e-9, abs=1e-12, nan_ok=True), key
