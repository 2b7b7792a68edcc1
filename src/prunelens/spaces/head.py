"""Stream pairs of logits: from the states that enter the head to row statistics, a few positions at a time.

Logits of size T×V never exist: for each chunk of positions the dense logits are made once, every compressed
model's logits are compared with them, and only the row statistics stay.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from prunelens.spaces.distributions import PairedRows
from prunelens.spaces.vectors import hidden_stats

Head = Callable[[Tensor], Tensor]
"""Logits (rows, V) of states (rows, d) that enter the language-model head."""

CPU_LOGITS_PER_CHUNK = 2**22  # 16 MB of float32
CPU_LOGITS_PER_PASS = 2**19  # five float64 buffers of 4 MB: they stay in a processor's cache
GPU_LOGITS = 2**25


class Pair:
    """A compressed model's states and head, to be compared with the dense ones.

    `states` is (T, d), aligned row by row with the dense states.
    """

    def __init__(self, states: Float[Tensor, "T d"], head: Head) -> None:
        self.states = states
        self.head = head


def stream_pairs(
    states: Float[Tensor, "T d"],
    head: Head,
    pairs: Sequence[Pair],
    token_ids: Int64[Tensor, " T"],
    temperature: float,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[dict[str, Tensor]]:
    """Row statistics (H1-P3, T2-T3+, A1, S1) of every compressed model against the dense one.

    Args:
        states: dense states that enter the head, (T, d).
        head: dense head.
        pairs: the compressed models.
        token_ids: the reference token of each row.
        temperature: T of the softmax.
        advance: called with the number of rows finished.

    Returns:
        For each pair a dictionary of CPU tensors with T rows each.
    """
    collected: list[list[dict[str, Tensor]]] = [[] for _ in pairs]
    buffers: PairedRows | None = None
    for start, stop, dense_logits in _logit_chunks(states, head):
        compressed_logits = [pair.head(pair.states[start:stop]) for pair in pairs]
        step = _rows_per_pass(dense_logits)
        if buffers is None:
            rows = min(step, dense_logits.shape[0])
            buffers = PairedRows(rows, dense_logits.shape[1], temperature, dense_logits.device)
        for low in range(0, stop - start, step):
            high = min(low + step, stop - start)
            tokens = token_ids[start + low : start + high].to(dense_logits.device)
            buffers.set_dense(dense_logits[low:high])
            for index, logits in enumerate(compressed_logits):
                stats = buffers.compare(logits[low:high].to(dense_logits.device), tokens)
                stats["top_ids_dense"] = buffers.top_ids
                collected[index].append({name: value.cpu() for name, value in stats.items()})
        advance(stop - start)
    return [_merge(parts) | _hidden(states, pair.states) for parts, pair in zip(collected, pairs, strict=True)]


def _logit_chunks(states: Tensor, head: Head) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, logits) with a bounded number of logits in each chunk."""
    total = states.shape[0]
    if total == 0:
        return
    num_tokens = head(states[:1]).shape[-1]
    budget = CPU_LOGITS_PER_CHUNK if states.device.type == "cpu" else GPU_LOGITS
    rows = max(1, budget // num_tokens)
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        yield start, stop, head(states[start:stop])


def _rows_per_pass(logits: Tensor) -> int:
    budget = CPU_LOGITS_PER_PASS if logits.device.type == "cpu" else GPU_LOGITS
    return max(1, budget // logits.shape[1])


def _hidden(dense: Tensor, compressed: Tensor) -> dict[str, Tensor]:
    parts = [
        hidden_stats(left.double(), right.double().to(left.device))
        for left, right in zip(dense.split(1024), compressed.split(1024), strict=True)
    ]
    return {name: value.cpu() for name, value in _merge(parts).items()}


def _merge(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if not parts:
        return {}
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
