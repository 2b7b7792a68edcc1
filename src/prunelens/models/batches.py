"""Batches of token sequences: by length, within a budget of tokens, padded on the right or on the left."""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from prunelens.errors import PrunelensError


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices grouped by similar length so that rows × longest row stays within `batch_tokens`.

    A sequence longer than the budget makes a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def with_tokens(sequences: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The calibration sequences that are not empty.

    Raises:
        PrunelensError: none is.
    """
    found = [sequence for sequence in sequences if len(sequence)]
    if not found:
        raise PrunelensError("expected calibration text with at least one token, found none")
    return found


def equal_batches(sequences: Sequence[Sequence[int]], batch_tokens: int) -> list[list[Sequence[int]]]:
    """Batches of sequences of one length each, so that nothing is padded; the longest first, empty ones left out."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for sequence in sequences:
        if len(sequence):
            by_length.setdefault(len(sequence), []).append(sequence)
    return [
        [same[index] for index in batch]
        for length, same in sorted(by_length.items(), reverse=True)
        for batch in plan_batches([length] * len(same), batch_tokens)
    ]


def pad_right(
    sequences: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, " B"]]:
    """(ids, lengths); padded with a row's own first token, which no causal state before it can see."""
    longest = max(len(sequence) for sequence in sequences)
    rows = [[*sequence, *[sequence[0]] * (longest - len(sequence))] for sequence in sequences]
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    return torch.tensor(rows, device=device), lengths


def pad_left(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, "B T"]]:
    """(ids, attention_mask) for generation."""
    longest = max(len(sequence) for sequence in sequences)
    rows = [[*[pad_id] * (longest - len(sequence)), *sequence] for sequence in sequences]
    mask = [[*[0] * (longest - len(sequence)), *[1] * len(sequence)] for sequence in sequences]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)
