"""L4: a model continues by itself, greedily and coupled with the dense model's sampled text (S3')."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from prunelens.models.model import Model
from prunelens.progress import Advance, unreported
from prunelens.tracing.generate import Continuation, Greedy, Rule, Sampled, softmax, uniforms, write

NUM_COUPLINGS = 16


@dataclass(frozen=True)
class SampledText:
    """A dense continuation sampled from the whole vocabulary, with the probability p(x) of each token."""

    continuation: Continuation
    probs: list[float]


class Coupled:
    """Optimal couplings, token by token, of a model with a dense trajectory (S3').

    A coupling keeps the dense model's token x with probability min(1, p'(x)/p(x)). Otherwise its next token
    is a draw from the normalised positive part of p' - p, which never is x: the texts have diverged, and how
    many tokens agreed is known. Until then both texts are the same, so one row of decoding carries several
    couplings; it ends when the last one has diverged.
    """

    def __init__(self, dense: SampledText, numbers: Float[np.ndarray, "steps couplings"], temperature: float) -> None:
        self._dense = dense
        self._numbers = numbers
        self._temperature = temperature
        self._together: Bool[np.ndarray, " couplings"] = np.ones(numbers.shape[1], dtype=bool)
        self.agreed = np.zeros(numbers.shape[1], dtype=int)
        self.finished = False

    def choose(self, step: int, logits: Float[Tensor, " V"]) -> int:
        """The dense model's token of `step` (from 0)."""
        token = self._dense.continuation.token_ids[step]
        own = float(softmax(logits, self._temperature)[token])
        self._together &= self._numbers[step] * self._dense.probs[step] < own
        self.agreed += self._together
        last = step + 1 == len(self._dense.continuation.token_ids)
        self.finished = last or not self._together.any()
        return token


def write_dense(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    advance: Advance = unreported,
) -> tuple[list[Continuation], list[SampledText]]:
    """The dense model's greedy and sampled continuations of each prompt, decoded side by side."""
    rules: list[Rule] = []
    for prompt, repeat in zip(prompts, _repeats(prompts), strict=True):
        numbers = uniforms(seed, "sample", prompt, repeat, max_new_tokens)
        rules += [Greedy(), Sampled(numbers, temperature)]
    rows = [prompt for prompt in prompts for _ in range(2)]
    written = write(model, rows, rules, max_new_tokens, batch_size, advance)
    draws = [
        SampledText(continuation, rule.probs[: len(continuation.token_ids)])
        for continuation, rule in zip(written[1::2], rules[1::2], strict=True)
        if isinstance(rule, Sampled)
    ]
    return written[::2], draws


def write_coupled(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampled: Sequence[SampledText],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    advance: Advance = unreported,
) -> tuple[list[Continuation], list[list[int]]]:
    """A compressed model's greedy continuations, and how many tokens each coupling with `sampled` agreed on.

    An agreed EOS counts as agreement up to `max_new_tokens`, since both texts have ended. Both kinds of rows
    are decoded side by side, in the same batches as the dense model's, so that a model compared with itself
    gives exactly the same states.
    """
    rules: list[Rule] = []
    for prompt, repeat, dense in zip(prompts, _repeats(prompts), sampled, strict=True):
        numbers = uniforms(seed, "coupling", prompt, repeat, max_new_tokens * NUM_COUPLINGS)
        rules += [Greedy(), Coupled(dense, numbers.reshape(max_new_tokens, NUM_COUPLINGS), temperature)]
    rows = [prompt for prompt in prompts for _ in range(2)]
    written = write(model, rows, rules, max_new_tokens, batch_size, advance)
    agreed = [
        _count_end(rule.agreed.tolist(), dense.continuation, max_new_tokens)
        for rule, dense in zip(rules[1::2], sampled, strict=True)
        if isinstance(rule, Coupled)
    ]
    return written[::2], agreed


def _count_end(agreed: list[int], dense: Continuation, horizon: int) -> list[int]:
    whole = len(dense.token_ids)
    return [horizon if dense.ended and length == whole else length for length in agreed]


def _repeats(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How often each prompt stood before: equal prompts get draws of their own."""
    seen: dict[tuple[int, ...], int] = {}
    found = []
    for prompt in map(tuple, prompts):
        found.append(seen.get(prompt, 0))
        seen[prompt] = found[-1] + 1
    return found
