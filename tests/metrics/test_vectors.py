"""The embedding space against the oracle, and Theorem 1 at its order."""

import pytest
import torch

import oracle
from prunelens.metrics.vectors import cosine_from_split, hidden_stats, split_deviation


def test_equals_oracle() -> None:
    dense, compressed = torch.randn(6, 40, dtype=torch.float64), torch.randn(6, 40, dtype=torch.float64)
    compressed[:3] = dense[:3] + 1e-4 * compressed[:3]
    found = hidden_stats(dense, compressed)
    for row in range(6):
        for name, value in oracle.vector_stats(dense[row], compressed[row]).items():
            assert found[name][row].item() == pytest.approx(value, rel=1e-10), name


def test_same_vectors_give_exact_values() -> None:
    vectors = torch.randn(5, 33, dtype=torch.float64)
    found = hidden_stats(vectors, vectors.clone())
    assert (found["hidden_cosine"] == 1).all()
    assert not found["hidden_alpha"].any()
    assert not found["hidden_rho"].any()


def test_exact_form_and_second_order() -> None:
    """T1: the exact form equals the cosine, and half the squared ρ approaches it at second order."""
    vector, direction = torch.randn(1, 64, dtype=torch.float64), torch.randn(1, 64, dtype=torch.float64)
    errors = []
    for size in (1e-2, 5e-3, 2.5e-3):
        alpha, rho = split_deviation(vector, vector + size * direction)
        cosine, deviation = cosine_from_split(alpha, rho**2)
        exact = torch.nn.functional.cosine_similarity(vector, vector + size * direction)
        assert float(cosine) == pytest.approx(float(exact), rel=1e-14)
        assert float(deviation) == pytest.approx(float(1 - exact), rel=1e-8)
        errors.append(abs(float(rho**2 / 2 / deviation) - 1))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.2)


def test_opposite_direction() -> None:
    vector = torch.randn(2, 10, dtype=torch.float64)
    alpha, rho = split_deviation(vector, -2 * vector)
    cosine, deviation = cosine_from_split(alpha, rho**2)
    assert torch.allclose(cosine, -torch.ones(2, dtype=torch.float64))
    assert torch.allclose(deviation, 2 * torch.ones(2, dtype=torch.float64))
