"""L4: a model continues by itself, greedily and coupled with the dense model's sampled text (S3')."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.models.loading import Model
from prunelens.spaces.head import Head
from prunelens.tracing.generate import Continuation, Greedy, Rule, Sampled, draw, softmax, uniforms, write


@dataclass(frozen=True)
class Draw:
    """A dense continuation sampled from the whole vocabulary, with the probability p(x) of each token."""

    continuation: Continuation
    probs: list[float]


class Coupled:
    """The optimal coupling, token by token, of a model with a dense trajectory (S3').

    At each step the dense model's token x is kept with probability min(1, p'(x)/p(x)); otherwise the token
    is drawn from the normalised positive part of p' - p, the texts part and the row ends. The token written
    is thus an exact draw from p'.
    """

    def __init__(self, dense: Draw, dense_head: Head, uniforms: np.ndarray, temperature: float) -> None:
        self._dense = dense
        self._dense_head = dense_head
        self._uniforms = uniforms.reshape(-1, 2)
        self._temperature = temperature
        self.finished = False
        self.agreed = 0

    def choose(self, step: int, logits: Float[Tensor, " V"]) -> int:
        """The token of `step` (from 0)."""
        written = self._dense.continuation
        token, own = written.token_ids[step], softmax(logits, self._temperature)
        accept, choice = self._uniforms[step]
        if accept * self._dense.probs[step] < float(own[token]):
            self.agreed = step + 1
            self.finished = self.agreed == len(written.token_ids)
            return token
        self.finished = True
        dense = softmax(self._dense_head(written.states[step : step + 1])[0], self._temperature)
        surplus = (own - dense.to(own.device)).clamp_min(0)
        return draw(surplus if float(surplus.sum()) > 0 else own, float(choice))


def write_dense(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[Continuation], list[Draw]]:
    """The dense model's greedy and sampled continuations of each prompt, decoded side by side."""
    repeats = _repeats(prompts)
    rules: list[Rule] = []
    for prompt, repeat in zip(prompts, repeats, strict=True):
        numbers = uniforms(seed, "sample", prompt, repeat, max_new_tokens)
        rules += [Greedy(), Sampled(numbers, temperature)]
    rows = [prompt for prompt in prompts for _ in range(2)]
    written = write(model, rows, rules, max_new_tokens, batch_size, advance)
    draws = [
        Draw(continuation, rule.probs[: len(continuation.token_ids)])
        for continuation, rule in zip(written[1::2], rules[1::2], strict=True)
        if isinstance(rule, Sampled)
    ]
    return written[::2], draws


def write_coupled(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampled: Sequence[Draw],
    dense_head: Head,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> tuple[list[Continuation], list[int]]:
    """A compressed model's greedy continuations, and how many tokens its coupling agreed with `sampled`.

    Both are decoded side by side, in the same batches as the dense model's, so that a model compared with
    itself gives exactly the same states.
    """
    rules: list[Rule] = []
    for prompt, repeat, dense in zip(prompts, _repeats(prompts), sampled, strict=True):
        numbers = uniforms(seed, "coupling", prompt, repeat, 2 * max_new_tokens)
        rules += [Greedy(), Coupled(dense, dense_head, numbers, temperature)]
    rows = [prompt for prompt in prompts for _ in range(2)]
    with torch.inference_mode():
        written = write(model, rows, rules, max_new_tokens, batch_size, advance)
    return written[::2], [rule.agreed for rule in rules[1::2] if isinstance(rule, Coupled)]


def _repeats(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How often each prompt stood before: equal prompts get draws of their own."""
    seen: dict[tuple[int, ...], int] = {}
    found = []
    for prompt in map(tuple, prompts):
        found.append(seen.get(prompt, 0))
        seen[prompt] = found[-1] + 1
    return found
