"""Stream pairs of logits: from the states that enter the head to row statistics, a few positions at a time.

Logits of size T×V never exist: for each chunk of positions the dense logits are made once, every compressed
model's logits are compared with them, and only the row statistics stay.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from prunelens.metrics.distributions import PairedRows
from prunelens.metrics.vectors import hidden_stats

Head = Callable[[Tensor], Tensor]
"""Logits (rows, V) of states (rows, d) that enter the language-model head."""

Stats = dict[str, Tensor]

LOGITS_AT_ONCE = 8
CPU_LOGITS_PER_CHUNK = 2**22  # 16 MB of float32
CPU_LOGITS_PER_PASS = 2**19  # six float64 buffers of 4 MB: they stay in a processor's cache
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
    pairing = LogitPairs(temperature)
    collected: list[list[Stats]] = [[] for _ in pairs]
    for start, stop, dense_logits in _logit_chunks(states, head):
        compressed_logits = [pair.head(pair.states[start:stop]) for pair in pairs]
        found = pairing.compare(dense_logits, compressed_logits, token_ids[start:stop])
        for parts, stats in zip(collected, found, strict=True):
            parts.append(stats)
        advance(stop - start)
    return [merge(parts) | hidden_rows(states, pair.states) for parts, pair in zip(collected, pairs, strict=True)]


def stream_divergences(
    states: Float[Tensor, "T d"],
    head: Head,
    pairs: Sequence[Pair],
    temperature: float,
    advance: Callable[[int], None] = lambda rows: None,
) -> list[dict[str, Tensor]]:
    """`kl_dense_compressed` (nats) and `tv` (P2) alone, (T,) each, at half the cost of `stream_pairs`.

    Made for many compressed models: only `LOGITS_AT_ONCE` of them have logits at a time. `advance` is called
    with the number of rows compared, once for each model.
    """
    pairing = LogitPairs(temperature)
    collected: list[list[Stats]] = [[] for _ in pairs]
    for start, stop, dense_logits in _logit_chunks(states, head):
        for low in range(0, len(pairs), LOGITS_AT_ONCE):
            group = slice(low, low + LOGITS_AT_ONCE)
            logits = [pair.head(pair.states[start:stop]) for pair in pairs[group]]
            for parts, stats in zip(collected[group], pairing.divergences(dense_logits, logits), strict=True):
                parts.append(stats)
            advance((stop - start) * len(logits))
    return [merge(parts) for parts in collected]


def token_costs(
    states: Float[Tensor, "T d"], head: Head, token_ids: Int64[Tensor, " T"], temperature: float = 1.0
) -> tuple[Float64[Tensor, " T"], Float64[Tensor, " T"]]:
    """(-log p of one token a row, entropy of the row's p), nats, from the states that enter the head.

    Both in float64 on the CPU. The entropy is what -log p comes to on average where the token is drawn from p.
    """
    costs, entropies = (torch.empty(len(token_ids), dtype=torch.float64) for _ in range(2))
    for start, stop, logits in _logit_chunks(states, head):
        logs = torch.log_softmax(logits.double() / temperature, dim=-1)
        tokens = token_ids[start:stop].to(logs.device).unsqueeze(1)
        costs[start:stop] = -logs.gather(1, tokens).squeeze(1).cpu()
        entropies[start:stop] = -torch.where(logs.isneginf(), 0.0, logs.exp() * logs).sum(dim=-1).cpu()
    return costs, entropies


class LogitPairs:
    """Compares chunks of logits, a few rows at a time in one set of float64 buffers."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._buffers: PairedRows | None = None

    def compare(
        self, dense: Float[Tensor, "rows V"], compressed: Sequence[Tensor | None], token_ids: Int64[Tensor, " rows"]
    ) -> list[dict[str, Tensor]]:
        """Row statistics of compressed logits against the dense ones, on the CPU; None stands for equal logits.

        See `PairedRows.compare`; equal logits give the columns of `PairedRows.identical`.
        """

        def measure(buffers: PairedRows, logits: Tensor | None, rows: slice) -> Stats:
            if logits is None:
                return buffers.identical()
            tokens = token_ids[rows].to(dense.device)
            return buffers.compare(logits[rows].to(dense.device), tokens) | {"top_ids_dense": buffers.top_ids}

        return self._each(dense, compressed, measure)

    def divergences(self, dense: Float[Tensor, "rows V"], compressed: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """`kl_dense_compressed` and `tv` of compressed logits against the dense ones, on the CPU."""

        def measure(buffers: PairedRows, logits: Tensor | None, rows: slice) -> Stats:
            assert logits is not None
            return buffers.divergences(logits[rows].to(dense.device))

        return self._each(dense, compressed, measure)

    def _each(
        self,
        dense: Tensor,
        compressed: Sequence[Tensor | None],
        measure: Callable[[PairedRows, Tensor | None, slice], Stats],
    ) -> list[Stats]:
        """Set a few dense rows at a time, and measure all compressed logits against them."""
        found: list[list[Stats]] = [[] for _ in compressed]
        step = min(_rows_per_pass(dense), dense.shape[0])
        if self._buffers is None or not self._buffers.fits(step, dense):
            self._buffers = PairedRows(step, dense.shape[1], self.temperature, dense.device)
        for low in range(0, dense.shape[0], step):
            rows = slice(low, min(low + step, dense.shape[0]))
            self._buffers.set_dense(dense[rows])
            for parts, logits in zip(found, compressed, strict=True):
                stats = measure(self._buffers, logits, rows)
                parts.append({name: value.cpu() for name, value in stats.items()})
        return [merge(parts) for parts in found]


def _logit_chunks(states: Tensor, head: Head) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, logits) with a bounded number of logits in each chunk."""
    total = states.shape[0]
    if total == 0:
        return
    rows = rows_per_chunk(head(states[:1]).shape[-1], states.device)
    for start in range(0, total, rows):
        stop = min(start + rows, total)
        yield start, stop, head(states[start:stop])


def rows_per_chunk(num_tokens: int, device: torch.device) -> int:
    """How many rows of a vocabulary of `num_tokens` are made at once."""
    return max(1, (CPU_LOGITS_PER_CHUNK if device.type == "cpu" else GPU_LOGITS) // num_tokens)


def _rows_per_pass(logits: Tensor) -> int:
    budget = CPU_LOGITS_PER_PASS if logits.device.type == "cpu" else GPU_LOGITS
    return max(1, budget // logits.shape[1])


def hidden_rows(dense: Float[Tensor, "T d"], compressed: Float[Tensor, "T d"]) -> dict[str, Tensor]:
    """H1 and H2 of states row by row, in float64 on the CPU."""
    parts = [
        hidden_stats(left.double(), right.double().to(left.device))
        for left, right in zip(dense.split(1024), compressed.split(1024), strict=True)
    ]
    return {name: value.cpu() for name, value in merge(parts).items()}


def merge(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Row statistics of consecutive chunks as one."""
    if not parts:
        return {}
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
