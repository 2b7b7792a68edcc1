"""N1: which positions are sampled, and that a sample holds what reading every text alone gives there."""

import pytest
import torch

from conftest import tiny_model
from prunelens.tracing import noise
from prunelens.tracing.forced import Trajectory, forced_states
from prunelens.tracing.noise import noise_sample, sampled_states


def texts(*lengths: int) -> list[Trajectory]:
    return [
        Trajectory(
            index, "greedy", (5, 9, 33 + index % 7), tuple(10 + (index + step) % 80 for step in range(length)), True
        )
        for index, length in enumerate(lengths)
    ]


def test_few_short_texts_are_read_whole() -> None:
    asked = texts(4, 1, 6)
    sample = noise_sample(asked, 0)
    assert list(sample.texts) == asked
    assert sample.steps == tuple(
        (index, step) for index, number in enumerate((4, 1, 6)) for step in range(1, number + 1)
    )
    assert sample.rows.tolist() == sample.own_rows.tolist() == list(range(11))
    assert (sample.total, sample.num_read) == (11, 3 * 3 + 11 - 3)


@pytest.mark.parametrize(("number", "length"), [(24, 17), (100, 40), (1, 2000), (400, 2)])
def test_a_sample_is_bounded_and_spread_over_texts_and_depth(number: int, length: int) -> None:
    asked = texts(*[length] * number)
    sample = noise_sample(asked, 3)
    chosen = sorted({index for index, _ in sample.steps})
    assert len(sample.texts) == len(chosen) == min(number, noise.MOST_TEXTS)
    assert len(sample.steps) == min(noise.MOST_POSITIONS, len(chosen) * length)
    share = len(sample.steps) // len(chosen)
    for place, index in enumerate(chosen):  # one of each stretch of the texts, and of each stretch of its depth
        assert place * number // len(chosen) <= index < (place + 1) * number // len(chosen)
        steps = [step for own, step in sample.steps if own == index]
        assert steps == sorted(set(steps))
        assert all(k * length // share < step <= (k + 1) * length // share for k, step in enumerate(steps))
        assert len(sample.texts[place].token_ids) == steps[-1]
    assert sample.total == number * length


def test_the_seed_draws_the_sample() -> None:
    asked = texts(*[40] * 100)
    assert noise_sample(asked, 1).steps == noise_sample(asked, 1).steps
    assert noise_sample(asked, 1).steps != noise_sample(asked, 2).steps


def test_sampled_states_are_those_of_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short texts among the long ones, so that rows, steps and cut texts all have other offsets."""
    monkeypatch.setattr(noise, "MOST_TEXTS", 3)
    monkeypatch.setattr(noise, "MOST_POSITIONS", 9)
    model = tiny_model("llama", torch.float64)
    asked = texts(12, 2, 7, 1, 15)
    sample = noise_sample(asked, 5)
    assert len(sample.steps) < sample.total
    whole = forced_states(model, asked)[0]
    offsets = [0, 12, 14, 21, 22]
    assert sample.rows.tolist() == [offsets[index] + step - 1 for index, step in sample.steps]
    torch.testing.assert_close(sampled_states(model, sample, 1), whole[sample.rows], rtol=1e-10, atol=1e-10)
