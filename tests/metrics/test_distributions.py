"""Row statistics against the float64 oracle, and their invariants."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from conftest import assert_stats
from prunelens.metrics.distributions import PairedRows, pair_stats
from prunelens.metrics.top_ids import top_ids

CASES = [
    (97, 1.0, 0.3),
    (97, 0.7, 0.3),
    (1000, 1.0, 0.01),
    (1000, 1.3, 1.0),
    (5000, 0.5, 0.1),
    (4, 1.0, 0.5),
    (700, 2.0, 3.0),
]


def pair(num_tokens: int, size: float, rows: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    dense = 3 * torch.randn(rows, num_tokens, generator=generator, dtype=torch.float64)
    compressed = dense + size * torch.randn(rows, num_tokens, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, num_tokens, (rows,), generator=generator)
    return dense.to(dtype), compressed.to(dtype), tokens


@pytest.mark.parametrize(("num_tokens", "temperature", "size"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_oracle(num_tokens: int, temperature: float, size: float, dtype: torch.dtype) -> None:
    dense, compressed, tokens = pair(num_tokens, size, dtype=dtype)
    found = pair_stats(dense, compressed, tokens, temperature)
    for row in range(len(dense)):
        expected = oracle.logit_stats(dense[row], compressed[row], temperature, int(tokens[row]))
        assert_stats(found, row, expected, 1e-9)


@pytest.mark.parametrize("scale", [50.0, 400.0, 3000.0])
def test_equals_oracle_where_probabilities_underflow(scale: float) -> None:
    dense, compressed, tokens = pair(300, 0.5)
    found = pair_stats(dense * scale, compressed.flip(0) * scale, tokens)
    for row in range(len(dense)):
        with np.errstate(all="ignore"):
            expected = oracle.logit_stats(dense[row] * scale, compressed.flip(0)[row] * scale, 1.0, int(tokens[row]))
        assert_stats(found, row, expected, 1e-8)


def test_same_logits_give_exact_zeros() -> None:
    dense, _, tokens = pair(5000, 1.0, dtype=torch.float32)
    found = pair_stats(dense, dense.clone(), tokens, 0.7)
    zeros = "logit_alpha logit_rho logit_rms_delta logit_var_uniform kl_dense_compressed kl_compressed_dense js tv"
    zeros += " delta_p_top1 delta_p_token prob_deviation_estimate kl_estimate kl_estimate_third trust log_ratio_token"
    ones = "logit_cosine logit_cosine_centered prob_cosine same_top1 rank_of_dense_top1 topk_overlap acceptance"
    assert all(not found[name].any() for name in zeros.split())
    assert all((found[name] == 1).all() for name in ones.split())
    assert torch.equal(found["entropy_dense"], found["entropy_compressed"])
    assert found["amplification"].isnan().all()
    assert found["amplification_estimate"].isnan().all()


SHIFT_FREE = (
    "logit_cosine_centered logit_var_uniform prob_cosine kl_dense_compressed kl_compressed_dense js "
    "tv same_top1 rank_of_dense_top1 topk_overlap delta_p_top1 delta_p_token "
    "entropy_dense entropy_compressed acceptance prob_deviation_estimate kl_estimate kl_estimate_third "
    "trust "
).split()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(-1000, 1000),
    st.floats(-1000, 1000),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([1e-3, 0.1, 1.0]),
)
def test_common_shift_changes_nothing_in_p(
    seed: int, left: float, right: float, temperature: float, size: float
) -> None:
    dense, compressed, tokens = pair(300, size, seed=seed)
    before = pair_stats(dense, compressed, tokens, temperature)
    after = pair_stats(dense + left, compressed + right, tokens, temperature)
    for name in SHIFT_FREE:
        assert torch.allclose(before[name].double(), after[name].double(), rtol=1e-7, atol=1e-12), name


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 3.0), st.floats(1e-4, 5.0))
def test_bounds_and_identities(seed: int, temperature: float, size: float) -> None:
    dense, compressed, tokens = pair(200, size, seed=seed)
    found = pair_stats(dense, compressed, tokens, temperature)
    back = pair_stats(compressed, dense, tokens, temperature)
    assert torch.allclose(found["kl_dense_compressed"], back["kl_compressed_dense"], rtol=1e-9, atol=1e-14)
    assert torch.allclose(found["js"], back["js"], rtol=1e-9, atol=1e-14)
    assert torch.allclose(found["tv"], back["tv"], rtol=1e-12)
    assert (found["tv"] ** 2 <= found["kl_dense_compressed"] / 2 + 1e-14).all()  # Pinsker
    assert (found["js"] <= math.log(2)).all()
    assert (found["js"] >= 0).all()
    p, q = (torch.softmax(logits / temperature, -1) for logits in (dense, compressed))
    assert torch.allclose(torch.minimum(p, q).sum(-1), 1 - found["tv"], atol=1e-12)  # S1


@pytest.mark.parametrize(
    ("truth", "estimate", "order"),
    [
        ("kl_dense_compressed", "kl_estimate", 1),
        ("kl_dense_compressed", "kl_estimate_third", 2),
        ("prob_cosine", "prob_deviation_estimate", 1),
    ],
)
def test_estimates_converge_at_their_order(truth: str, estimate: str, order: int) -> None:
    dense, compressed, tokens = pair(500, 1.0, rows=1)
    errors = []
    for size in (2e-2, 1e-2, 5e-3):
        found = pair_stats(dense, dense + size * (compressed - dense), tokens)
        exact = 1 - found[truth] if truth == "prob_cosine" else found[truth]
        errors.append(abs(float(found[estimate] / exact - 1)))
    for before, after in pairwise(errors):
        assert before / after == pytest.approx(2**order, rel=0.15)


@pytest.mark.parametrize(("rows", "num_tokens"), [(5, 97), (3, 1000), (2, 64 * 40 + 17), (1, 7)])
def test_top_ids_equal_a_sort(rows: int, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for logits in (torch.randn(rows, num_tokens, generator=generator), torch.randint(0, 4, (rows, num_tokens)).float()):
        found = top_ids(logits, 10)
        expected = logits.sort(dim=1, descending=True, stable=True)
        assert torch.equal(logits.gather(1, found), expected.values[:, :10])
        assert torch.equal(found[:, 0], expected.indices[:, 0])
        assert all(len(set(row)) == len(row) for row in found.tolist())


def test_buffers_may_be_reused_for_fewer_rows() -> None:
    dense, compressed, tokens = pair(300, 0.5, rows=5)
    rows = PairedRows(4, 300, 1.0, dense.device)
    whole = pair_stats(dense, compressed, tokens)
    for low, high in ((0, 4), (4, 5)):
        rows.set_dense(dense[low:high])
        part = rows.compare(compressed[low:high], tokens[low:high])
        for name, value in part.items():
            assert torch.allclose(value.double(), whole[name][low:high].double(), rtol=1e-12, atol=1e-15), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_what_is_not_finite(bad: float) -> None:
    dense, compressed, tokens = pair(50, 0.5)
    compressed[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        pair_stats(dense, compressed, tokens)
