"""What a benchmark is asked for, and what it measured of each model."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from prunelens.errors import check_seed, check_whole

OVERHEAD_PASSES = 2
"""Untimed runs of each model: one warms it up, one is watched for its memory."""


@dataclass(frozen=True)
class SpeedSettings:
    """What is run: `repeats` times a prompt of `context` tokens and `new_tokens` more, `batch_size` rows at once."""

    batch_size: int = 1
    context: int = 512
    new_tokens: int = 32
    repeats: int = 5
    seed: int = 0

    def check(self) -> None:
        """Refuse settings without meaning.

        Raises:
            PrunelensError: as said.
        """
        for name in ("batch_size", "context", "new_tokens"):
            check_whole(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        check_whole("--repeats", self.repeats, 2)
        check_seed(self.seed)

    def num_runs(self, num_models: int) -> int:
        """How often `measure_speeds` advances in all."""
        return num_models * (self.repeats + OVERHEAD_PASSES)


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest value over the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Speed:
    """What was measured of one model.

    Attributes:
        label: what the model is called.
        settings: what was run.
        device: where it ran, in words.
        dtype: of its states.
        prefill_tokens_per_second: prompt tokens of all rows, over the seconds of one forward pass with a cache.
        decode_tokens_per_second: new tokens of all rows, over the seconds of one forward pass for each; nothing is
            chosen from the logits, as the tokens are given.
        prefill_ratio: to the dense model, inside each repeat; None for the dense model itself.
        decode_ratio: the same of decoding.
        peak_memory_bytes: weights in memory and the most that one prefill with its decoding added; None where it
            cannot be measured.
        memory_source: what was watched for that, in words; None as before.
        kv_bytes_per_token: bytes of keys and values after the prefill, over all tokens of all rows. An attention that
            is taken out keeps one empty key and value number a token, so that the others know the length.
        state_bytes: bytes a row of states that do not grow with the text (convolutions, state spaces).
        weight_bytes_in_memory: of the weights that are read, tied ones once; weights of parts that are taken out of a
            shared model do not count.
        weight_bytes_stored: of its files; None where it has none of its own (`benchmark` then tells what saving the
            recipe's result would write).
        zero_fraction: share of exact zeros in the blocks' matrices, quantised ones not counted.
        notes: what a reader should know, above all where nothing is saved.
    """

    label: str
    settings: SpeedSettings
    device: str
    dtype: str
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    prefill_ratio: Spread | None
    decode_ratio: Spread | None
    peak_memory_bytes: int | None
    memory_source: str | None
    kv_bytes_per_token: float
    state_bytes: float
    weight_bytes_in_memory: int
    weight_bytes_stored: int | None
    zero_fraction: float
    notes: tuple[str, ...]
