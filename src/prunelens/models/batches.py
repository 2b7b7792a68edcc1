"""Batches of token sequences: by length, within a budget of tokens, padded on the right or on the left."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from prunelens.errors import PrunelensError

ANY_LENGTH = sys.maxsize


@dataclass(frozen=True)
class Batching:
    """Which rows of a batch change nothing of one another.

    Attributes:
        read_up_to: tokens up to which texts of different lengths may be read side by side, padded on the right.
        written_up_to: tokens, new ones included, up to which prompts of different lengths may be continued side by
            side, padded on the left.
        together: whether rows of one length may share a batch at all.
    """

    read_up_to: int = ANY_LENGTH
    written_up_to: int = ANY_LENGTH
    together: bool = True

    def __and__(self, other: "Batching") -> "Batching":
        """What holds for two models that share their batches."""
        return Batching(
            min(self.read_up_to, other.read_up_to),
            min(self.written_up_to, other.written_up_to),
            self.together and other.together,
        )

    @property
    def is_free(self) -> bool:
        """Whether any rows may share a batch."""
        return self == Batching()

    @property
    def reads_any_lengths(self) -> bool:
        """Whether any texts may be read side by side."""
        return self.together and self.read_up_to == ANY_LENGTH

    def reads_together(self, one: int, other: int) -> bool:
        """Whether texts of these lengths may be read side by side."""
        return self.together and (one == other or max(one, other) <= self.read_up_to)

    def writes_together(self, one: int, other: int, new_tokens: int) -> bool:
        """Whether prompts of these lengths may be continued side by side."""
        return self.together and (one == other or max(one, other) + new_tokens <= self.written_up_to)


def plan_batches(lengths: Sequence[int], batch_tokens: int, batching: Batching) -> list[list[int]]:
    """Indices grouped by similar length so that rows × longest row stays within `batch_tokens`.

    A sequence longer than the budget makes a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        fits = bool(batches) and (len(batches[-1]) + 1) * longest <= batch_tokens
        if not fits or not batching.reads_together(longest, lengths[index]):
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


def equal_batches(
    sequences: Sequence[Sequence[int]], batch_tokens: int, batching: Batching
) -> list[list[Sequence[int]]]:
    """Batches of sequences of one length each, so that nothing is padded; the longest first, empty ones left out."""
    by_length: dict[int, list[Sequence[int]]] = {}
    for sequence in sequences:
        if len(sequence):
            by_length.setdefault(len(sequence), []).append(sequence)
    return [
        [same[index] for index in batch]
        for length, same in sorted(by_length.items(), reverse=True)
        for batch in plan_batches([length] * len(same), batch_tokens, batching)
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
