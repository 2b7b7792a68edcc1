"""L3 against the oracle, which runs both models from scratch on growing prefixes."""

import pytest
import torch

import oracle
from conftest import assert_stats, tiny_model
from prunelens.metrics.head import Pair, stream_pairs
from prunelens.models.surgery.drop import Drop
from prunelens.tracing.forced import Trajectory, forced_states

DROPS = {
    "attention": (Drop(attention=frozenset([2])), {"attention": [2]}),
    "first": (Drop(attention=frozenset([0])), {"attention": [0]}),
    "several": (Drop(attention=frozenset([1]), mlp=frozenset([3])), {"attention": [1], "mlp": [3]}),
    "block": (Drop(block=frozenset([1, 2])), {"blocks": [1, 2]}),
}


def trajectories() -> list[Trajectory]:
    shapes = [(5, 7), (3, 2), (8, 4), (1, 1)]
    return [
        Trajectory(
            index,
            "greedy",
            tuple(torch.randint(3, 97, (prompt,)).tolist()),
            tuple(torch.randint(3, 97, (steps,)).tolist()),
            False,
        )
        for index, (prompt, steps) in enumerate(shapes)
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_quantity_equals_the_oracle(family: str, temperature: float) -> None:
    model = tiny_model(family, torch.float64)
    read = trajectories()
    drops = [drop for drop, _ in DROPS.values()]
    states, *compressed = forced_states(model, read, drops, batch_tokens=24)
    tokens = torch.tensor([token for trajectory in read for token in trajectory.token_ids])
    pairs = [Pair(own, model.head) for own in compressed]
    found = stream_pairs(states, model.head, pairs, tokens, temperature)
    for stats, (_, parts) in zip(found, DROPS.values(), strict=True):
        zeroed = oracle.zeroed(model.network, **parts)
        rows = [
            row
            for trajectory in read
            for row in oracle.step_rows(model.network, zeroed, trajectory.prompt_ids, trajectory.token_ids, temperature)
        ]
        assert len(rows) == len(tokens)
        for index, row in enumerate(rows):
            expected = {name: value for name, value in row.items() if name in stats}
            assert len(expected) == 28
            assert_stats(stats, index, expected, 1e-8)


@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
def test_batches_change_nothing(batch_tokens: int) -> None:
    model = tiny_model("qwen3", torch.float64)
    read = trajectories()
    drops = [drop for drop, _ in DROPS.values()]
    expected = forced_states(model, read, drops, batch_tokens=64)
    for one, other in zip(forced_states(model, read, drops, batch_tokens), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_nothing_dropped_gives_the_same_states() -> None:
    states, same = forced_states(tiny_model(), trajectories(), [Drop()])
    assert torch.equal(states, same)


def test_progress_counts_every_token() -> None:
    read, seen = trajectories(), []
    forced_states(tiny_model(), read, advance=seen.append)
    assert sum(seen) == sum(len(trajectory.read_ids) for trajectory in read)
