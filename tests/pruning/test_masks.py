"""Masks against slow loops, bit for bit, ties included; SparseGPT's weights to 1e-4, and its error the smallest."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mask_oracle
from prunelens.errors import PrunelensError
from prunelens.pruning.masks import lowest
from prunelens.pruning.methods import InputStatistics, magnitude, wanda
from prunelens.pruning.sparsegpt import curvature, sparsegpt_weight
from prunelens.pruning.values import Pattern

PATTERNS = [0.5, 0.3, 0.9, (2, 4), (4, 8), (1, 4), (3, 6)]


def pattern_of(asked: mask_oracle.Pattern) -> Pattern:
    return Pattern(asked[0] / asked[1], *asked) if isinstance(asked, tuple) else Pattern(asked)


def magnitude_mask(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    return lowest(magnitude(weight), pattern, "matrix")


def wanda_mask(weight: torch.Tensor, squares: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    return lowest(wanda(weight, InputStatistics(squares, 1)), pattern, "row")


def some_weight(seed: int, rows: int, columns: int, ties: bool) -> torch.Tensor:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns)
    return (weight * 3).round() / 8 if ties else weight  # few values, many of them zero


def some_sequences(seed: int, columns: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    scales = generator.uniform(0.05, 3, columns)
    return [(generator.normal(size=(length, columns)) * scales).astype(np.float32) for length in (40, 17, 33)]


def squares_of(sequences: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(sequences)).double().square().sum(dim=0)


def products_of(sequences: list[np.ndarray]) -> torch.Tensor:
    values = torch.from_numpy(np.concatenate(sequences))
    return values.T @ values


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(PATTERNS), st.integers(1, 9), st.booleans())
def test_masks_equal_slow_ones_bit_for_bit(seed: int, asked: mask_oracle.Pattern, rows: int, ties: bool) -> None:
    weight, sequences = some_weight(seed, rows, 24, ties), some_sequences(seed, 24)
    pattern, inputs = pattern_of(asked), np.concatenate(sequences)
    if isinstance(asked, tuple):
        by_size = mask_oracle.n_m_mask(np.abs(weight.numpy()), *asked)
        by_wanda = mask_oracle.n_m_mask(mask_oracle.wanda_metric(weight.numpy(), inputs), *asked)
    else:
        by_size = mask_oracle.magnitude_mask(weight.numpy(), asked)
        by_wanda = mask_oracle.wanda_mask(weight.numpy(), inputs, asked)
    assert np.array_equal(magnitude_mask(weight, pattern).numpy(), by_size)
    assert np.array_equal(wanda_mask(weight, squares_of(sequences), pattern).numpy(), by_wanda)


@pytest.mark.parametrize("ties", [False, True])
def test_the_sparsity_is_exact(ties: bool) -> None:
    weight = some_weight(1, 16, 48, ties)
    squares = squares_of(some_sequences(1, 48))
    for ratio in (0.5, 0.3, 0.999, 0.001):
        assert (wanda_mask(weight, squares, Pattern(ratio)).sum(dim=1) == int(48 * ratio)).all()
    for zeros, group in ((2, 4), (4, 8), (1, 16)):
        pattern = Pattern(zeros / group, zeros, group)
        for mask in (wanda_mask(weight, squares, pattern), magnitude_mask(weight, pattern)):
            assert (mask.unflatten(1, (-1, group)).sum(dim=-1) == zeros).all()
    if not ties:
        assert magnitude_mask(weight, Pattern(0.5)).sum() == 16 * 48 // 2 + 1  # the threshold itself goes too


@pytest.mark.parametrize("asked", [0.5, 0.3, (2, 4), (4, 8)])
@pytest.mark.parametrize("columns", [48, 312])
def test_sparsegpt_equals_the_slow_one(asked: mask_oracle.Pattern, columns: int) -> None:
    weight, sequences = some_weight(2, 20, columns, ties=False), some_sequences(2, columns)
    for one in sequences:
        one[:, [3, 11]] = 0  # dead inputs
    found = sparsegpt_weight(weight, curvature(products_of(sequences), len(sequences)), pattern_of(asked))
    expected = mask_oracle.sparsegpt(weight.numpy().astype(np.float64), sequences, asked)
    assert np.array_equal(found.numpy() == 0, expected == 0)
    assert np.abs(found.numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("asked", [0.5, (2, 4), (4, 8)])
def test_sparsegpt_changes_the_outputs_least(asked: mask_oracle.Pattern) -> None:
    torch.manual_seed(3)
    mixing = torch.randn(64, 64)
    sequences = [(torch.randn(80, 64) @ mixing).numpy() for _ in range(4)]  # inputs that depend on one another
    weight, pattern = some_weight(3, 32, 64, ties=False), pattern_of(asked)
    news = {
        "sparsegpt": sparsegpt_weight(weight, curvature(products_of(sequences), 4), pattern),
        "wanda": weight.masked_fill(wanda_mask(weight, squares_of(sequences), pattern), 0),
        "magnitude": weight.masked_fill(magnitude_mask(weight, pattern), 0),
    }
    errors = {
        name: mask_oracle.reconstruction_error(weight.numpy(), new.numpy(), sequences) for name, new in news.items()
    }
    assert errors["sparsegpt"] < min(errors["wanda"], errors["magnitude"])


def test_inputs_that_are_no_numbers_are_refused() -> None:
    products = torch.full((8, 8), torch.nan)
    with pytest.raises(PrunelensError, match="finite activations"):
        curvature(products, 1)
