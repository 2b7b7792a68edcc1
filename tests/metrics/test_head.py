"""Streaming: no chunk size changes a number, and all compressed models are compared in one stream."""

import pytest
import torch

from prunelens.metrics import head
from prunelens.metrics.distributions import pair_stats
from prunelens.metrics.head import Pair, stream_pairs


def setup(rows: int = 37, width: int = 12, num_tokens: int = 201):
    weight = torch.randn(num_tokens, width, dtype=torch.float64)
    states = torch.randn(rows, width, dtype=torch.float64)
    others = [states + 0.1 * torch.randn(rows, width, dtype=torch.float64) for _ in range(2)]
    tokens = torch.randint(0, num_tokens, (rows,))
    return (lambda chunk: chunk @ weight.T), states, others, tokens


@pytest.mark.parametrize(("chunk", "inner"), [(201, 201), (201 * 5, 201 * 3), (201 * 50, 201 * 50), (1, 1)])
def test_chunks_equal_the_whole(monkeypatch: pytest.MonkeyPatch, chunk: int, inner: int) -> None:
    function, states, others, tokens = setup()
    monkeypatch.setattr(head, "CPU_LOGITS_PER_CHUNK", chunk)
    monkeypatch.setattr(head, "CPU_LOGITS_PER_PASS", inner)
    seen: list[int] = []
    found = stream_pairs(states, function, [Pair(own, function) for own in others], tokens, 0.8, seen.append)
    assert sum(seen) == len(states)
    for own, stats in zip(others, found, strict=True):
        expected = pair_stats(function(states), function(own), tokens, 0.8)
        for name, value in expected.items():
            assert torch.allclose(stats[name].double(), value.double(), rtol=1e-10, atol=1e-14), name
        assert stats["hidden_cosine"].shape == (len(states),)


def test_dense_logits_are_made_once() -> None:
    function, states, others, tokens = setup()
    rows = []

    def counted(chunk: torch.Tensor) -> torch.Tensor:
        rows.append(len(chunk))
        return function(chunk)

    stream_pairs(states, counted, [Pair(own, function) for own in others], tokens, 1.0)
    assert sum(rows) <= len(states) + 1  # one row asks for the size of the vocabulary
