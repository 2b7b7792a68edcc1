"""Let a model write: batched cached decoding with one rule a row, keeping the states that enter the head.

The rule of a row chooses each token from the row's logits: the most likely one (greedy), a draw from the
whole distribution (sampled), or the dense model's token in a coupling (S3'). Draws come from a number
per row and step that depends on the seed and the prompt alone, so neither the batch nor the order of the
prompts changes what is written.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from prunelens.models.batches import Batching, pad_left
from prunelens.models.decoding import decode
from prunelens.models.model import Model
from prunelens.progress import Advance, unreported


@runtime_checkable
class Rule(Protocol):
    """Chooses the next token of one row; `finished` ends the row before its EOS."""

    finished: bool

    def choose(self, step: int, logits: Float[Tensor, " V"]) -> int:
        """The token of `step` (from 0)."""
        ...


class Greedy:
    """The most likely token, the lowest id among equals."""

    finished = False

    def choose(self, step: int, logits: Float[Tensor, " V"]) -> int:
        """The token of `step` (from 0)."""
        return int(logits.argmax())


class Sampled:
    """A draw at temperature T from the whole vocabulary."""

    finished = False

    def __init__(self, uniforms: np.ndarray, temperature: float) -> None:
        self._uniforms = uniforms
        self._temperature = temperature
        self.probs: list[float] = []

    def choose(self, step: int, logits: Float[Tensor, " V"]) -> int:
        """The token of `step` (from 0)."""
        probs = softmax(logits, self._temperature)
        token = draw(probs, float(self._uniforms[step]))
        self.probs.append(float(probs[token]))
        return token


@dataclass
class Continuation:
    """What a model wrote after a prompt.

    Attributes:
        token_ids: the tokens, EOS included where it was reached.
        states: (num tokens, d), the state that entered the head before each of them.
        ended: whether EOS was reached.
    """

    token_ids: list[int]
    states: Float[Tensor, "_ d"]
    ended: bool


def softmax(logits: Float[Tensor, " V"], temperature: float) -> Float[Tensor, " V"]:
    """Probabilities in float64."""
    return torch.softmax(logits.double() / temperature, dim=-1)


def draw(weights: Float[Tensor, " V"], uniform: float) -> int:
    """Index i with probability weights[i] / Σ weights, from a number in [0, 1)."""
    cumulative = torch.cumsum(weights, dim=0)
    target = cumulative[-1] * uniform
    index = int(torch.searchsorted(cumulative, target, right=True))
    return min(index, weights.shape[0] - 1)


def uniforms(seed: int, purpose: str, prompt: Sequence[int], repeat: int, count: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on the seed, the purpose, the prompt's tokens and its repetition only."""
    text = f"{seed}|{purpose}|{repeat}|{','.join(map(str, prompt))}"
    entropy = int.from_bytes(hashlib.sha256(text.encode()).digest(), "little")
    return np.random.default_rng(entropy).random(count)


def write(
    model: Model,
    prompts: Sequence[Sequence[int]],
    rules: Sequence[Rule],
    max_new_tokens: int,
    batch_size: int,
    advance: Advance = unreported,
) -> list[Continuation]:
    """Continue each prompt by its rule until EOS or `max_new_tokens`.

    Args:
        model: the model as it runs now (parts may be dropped around the call).
        prompts: token ids, one a row.
        rules: one a row.
        batch_size: rows decoded together.
        advance: called with the number of row-steps finished.
    """
    found: dict[int, Continuation] = {}
    for rows in _group(prompts, max_new_tokens, batch_size, model.anatomy.batching):
        batch = _write_batch(
            model, [prompts[row] for row in rows], [rules[row] for row in rows], max_new_tokens, advance
        )
        found.update(zip(rows, batch, strict=True))
    return [found[row] for row in range(len(prompts))]


def _group(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, batching: Batching
) -> list[list[int]]:
    """Rows decoded together: the longest first, and only such as change nothing of one another."""
    groups: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row])):
        fits = bool(groups) and len(groups[-1]) < batch_size
        longest = len(prompts[groups[-1][0]]) if groups else 0
        if not fits or not batching.writes_together(longest, len(prompts[row]), max_new_tokens):
            groups.append([])
        groups[-1].append(row)
    return groups


def _write_batch(
    model: Model,
    prompts: list[Sequence[int]],
    rules: list[Rule],
    max_new_tokens: int,
    advance: Callable[[int], None],
) -> list[Continuation]:
    eos_ids = model.eos_ids
    ids, mask = pad_left(prompts, eos_ids[0] if eos_ids else 0, model.device)
    chooser = _Chooser(rules, ids.shape[1], advance)
    cached = model.anatomy.manner.cached
    written, states = decode(model.network, ids, mask, max_new_tokens, eos_ids, chooser, _Finished(rules), cached)
    return _cut(written, states, chooser.num_chosen, eos_ids)


def _cut(written: Tensor, states: Tensor, num_chosen: list[int], eos_ids: list[int]) -> list[Continuation]:
    """End each row at its first EOS, or where its rule finished."""
    found = []
    for row, tokens in enumerate(written.tolist()):
        tokens = tokens[: num_chosen[row]]
        stop = next((at + 1 for at, token in enumerate(tokens) if token in eos_ids), None)
        kept = tokens[:stop]
        found.append(Continuation(kept, states[row, : len(kept)].clone(), stop is not None))
    return found


class _Chooser(LogitsProcessor):
    """Lets each row's rule choose, and leaves only that token."""

    def __init__(self, rules: list[Rule], prompt_length: int, advance: Callable[[int], None]) -> None:
        self._rules = rules
        self._prompt_length = prompt_length
        self._advance = advance
        self.num_chosen = [0] * len(rules)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._prompt_length
        chosen = torch.full_like(scores, -torch.inf)
        for row, rule in enumerate(self._rules):
            token = 0
            if not rule.finished:
                token = rule.choose(step, scores[row])
                self.num_chosen[row] = step + 1
            chosen[row, token] = 0
        self._advance(len(self._rules))
        return chosen


class _Finished(StoppingCriteria):
    def __init__(self, rules: list[Rule]) -> None:
        self._rules = rules

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([rule.finished for rule in self._rules], device=input_ids.device)
