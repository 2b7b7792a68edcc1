"""The damage of drops on top of drops: whole runs of zeroed networks in float64, and its invariants."""

from typing import Any

import pytest
import torch

import prunelens.tracing.greedy_drop as module
from conftest import tiny_model
from oracle import zeroed
from prunelens.models.model import Model
from prunelens.models.surgery.drop import NOTHING, Drop
from prunelens.tracing.forced import Trajectory
from prunelens.tracing.greedy_drop import Part, damage_of_drops

TRAJECTORIES = [
    Trajectory(0, "greedy", (5, 9, 33), (71, 8, 8, 15), False),
    Trajectory(1, "greedy", (4, 90, 17, 3, 60, 44), (61,), True),
    Trajectory(2, "greedy", (12,), (61, 62, 30), True),
]
EVERY: list[Part] = [(kind, layer_idx) for layer_idx in range(4) for kind in ("attention", "mlp")]
BASES = [
    NOTHING,
    Drop(attention=frozenset([1])),
    Drop(attention=frozenset([1]), mlp=frozenset([2])),
    Drop(mlp=frozenset([0, 3])),
    Drop(block=frozenset([2])),
]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def dense(request: pytest.FixtureRequest) -> Model:
    return tiny_model(request.param, torch.float64)


def log_probabilities(network: Any, text: Trajectory, temperature: float) -> torch.Tensor:
    """(steps, V): log p of what follows, from one whole run without padding."""
    with torch.inference_mode():
        logits = network(input_ids=torch.tensor([[*text.prompt_ids, *text.token_ids]]), use_cache=False).logits[0]
    steps = logits[len(text.prompt_ids) - 1 : -1] / temperature
    return steps - steps.exp().sum(dim=-1, keepdim=True).log()


def mean_kl(dense: Model, drop: Drop, temperature: float = 1.0) -> torch.Tensor:
    """KL(p‖p'), nats, for each text the mean over its steps."""
    network = zeroed(dense.network, attention=drop.attention, mlp=drop.mlp, blocks=drop.block)
    found = []
    for text in TRAJECTORIES:
        log_p, log_q = (log_probabilities(one, text, temperature) for one in (dense.network, network))
        found.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())
    return torch.stack(found)


def with_part(drop: Drop, part: Part) -> Drop:
    return drop | Drop(**{part[0]: frozenset([part[1]])})


def assert_equal(found: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12), (what, found, expected)


@pytest.mark.parametrize("base", BASES, ids=lambda drop: str(sorted(map(sorted, vars(drop).values()))))
def test_damage_equals_whole_runs_of_zeroed_networks(dense: Model, base: Drop) -> None:
    whole, found = damage_of_drops(dense, TRAJECTORIES, base, EVERY)
    assert_equal(whole, mean_kl(dense, base), base)
    assert list(found) == EVERY
    for part, values in found.items():
        assert_equal(values, mean_kl(dense, with_part(base, part)), part)
    if base == NOTHING:
        assert whole.tolist() == [0, 0, 0]
        assert all((values > 0).all() for values in found.values())
    for kind in ("attention", "mlp"):  # what is out already changes nothing
        for layer_idx in getattr(base, kind) | base.block:
            assert_equal(found[kind, layer_idx], whole, (kind, layer_idx))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature(dense: Model, temperature: float) -> None:
    whole, found = damage_of_drops(dense, TRAJECTORIES, BASES[2], [("mlp", 1)], temperature)
    assert_equal(whole, mean_kl(dense, BASES[2], temperature), "base")
    assert_equal(found["mlp", 1], mean_kl(dense, with_part(BASES[2], ("mlp", 1)), temperature), "mlp 1")


def test_batches_and_order_change_nothing(dense: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, found = damage_of_drops(dense, TRAJECTORIES, BASES[2], EVERY)
    for batch_tokens in (1, 9):
        monkeypatch.setattr(module, "BATCH_TOKENS", batch_tokens)
        other_whole, other = damage_of_drops(dense, TRAJECTORIES, BASES[2], EVERY[::-1])
        assert_equal(other_whole, whole, batch_tokens)
        assert list(other) == EVERY[::-1]
        for part in EVERY:
            assert_equal(other[part], found[part], (batch_tokens, part))


def test_no_candidates_and_the_model_afterwards(dense: Model) -> None:
    ids = torch.tensor([[5, 9, 33]])
    before = dense.network(ids).logits
    whole, found = damage_of_drops(dense, TRAJECTORIES, BASES[1], [])
    assert_equal(whole, mean_kl(dense, BASES[1]), "base")
    assert found == {}
    assert torch.equal(dense.network(ids).logits, before)


def test_progress_reaches_its_total(dense: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_TOKENS", 9)
    done: list[int] = []
    damage_of_drops(dense, TRAJECTORIES, BASES[1], EVERY[:3], advance=done.append)
    assert len(done) > 1
    assert sum(done) == 8 * (1 + 3)
