"""Let a model write: batched cached decoding with one rule a row, keeping the states that enter the head.

The rule of a row chooses each token from the row's logits: the most likely one (greedy), a draw from the whole
distribution (sampled), or one from what a checkpoint's generation settings leave of it (warped). Draws come from a
number per row and step that depends on the seed and the prompt alone, so neither the batch nor the order of the
prompts changes what is written.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from prunelens.models.batches import Batching, pad_left
from prunelens.models.decoding import Rows, decode
from prunelens.models.model import Model
from prunelens.progress import Advance, unreported

WORTH_LEAVING = 0.75
"""Rows leave a batch when at most this share of it is still writing: copying their past is not free."""


CPU_DRAWN_AT_ONCE = 2**18  # 2 MB of float64: larger tensors are fresh memory, which costs six times the arithmetic
GPU_DRAWN_AT_ONCE = 2**25


class Greedy:
    """The most likely token, the lowest id among equals."""


@dataclass(frozen=True)
class Sampled:
    """A draw from the whole vocabulary.

    Attributes:
        uniforms: (steps,), the number in [0, 1) that decides each draw.
        temperature: T of the softmax, > 0.
    """

    uniforms: Float[np.ndarray, " steps"]
    temperature: float


@dataclass(frozen=True)
class Warped:
    """A draw from what logits processors leave of the distribution.

    Attributes:
        uniforms: (steps,), the number in [0, 1) that decides each draw.
        processors: transformers' logits processors, from (1, T) token ids and (1, V) logits to (1, V) logits.
        prompt: the row's prompt, which they see too.
    """

    uniforms: Float[np.ndarray, " steps"]
    processors: Sequence[Any]
    prompt: Sequence[int]


Rule = Greedy | Sampled | Warped


@dataclass
class Continuation:
    """What a model wrote after a prompt.

    Attributes:
        token_ids: the tokens, EOS included where it was reached.
        states: (num tokens - start, d), the state that entered the head before each token from `start` on.
        ended: whether EOS was reached.
        start: tokens at the beginning that were known without writing.
    """

    token_ids: list[int]
    states: Float[Tensor, "_ d"]
    ended: bool
    start: int = 0


def softmax(logits: Float[Tensor, "rows V"], temperature: Float[Tensor, "rows 1"] | float) -> Float[Tensor, "rows V"]:
    """Probabilities in float64."""
    return torch.softmax(logits.double() / temperature, dim=-1)


def draw(weights: Float[Tensor, "rows V"], uniforms: Float[Tensor, " rows"]) -> Int64[Tensor, " rows"]:
    """Index i of each row with probability weights[i] / Σ weights, from a number in [0, 1)."""
    cumulative = torch.cumsum(weights, dim=-1)
    targets = cumulative[:, -1:] * uniforms.unsqueeze(-1)
    found = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    return found.clamp_max(weights.shape[-1] - 1)


def uniforms(seed: int, purpose: str, prompt: Sequence[int], repeat: int, count: int) -> np.ndarray:
    """Numbers in [0, 1) that depend on the seed, the purpose, the prompt's tokens and its repetition only."""
    text = f"{seed}|{purpose}|{repeat}|{','.join(map(str, prompt))}"
    entropy = int.from_bytes(hashlib.sha256(text.encode()).digest(), "little")
    return np.random.default_rng(entropy).random(count)


def write(
    model: Model,
    prompts: Sequence[Sequence[int]],
    rules: Sequence[Rule],
    max_new_tokens: int | Sequence[int],
    batch_size: int,
    advance: Advance = unreported,
) -> list[Continuation]:
    """Continue each prompt by its rule until EOS or `max_new_tokens`.

    Args:
        model: the model as it runs now (parts may be dropped around the call).
        prompts: token ids, one a row; rows of the same prompt share its reading.
        rules: one a row.
        max_new_tokens: at least 1, for all rows or one a row.
        batch_size: rows decoded together.
        advance: called with the number of row-steps finished; those that a row does not need count as finished.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    found: dict[int, Continuation] = {}
    for rows in _group(prompts, max(limits, default=0), batch_size, model.anatomy.batching):
        texts = _Texts([rules[row] for row in rows], [limits[row] for row in rows], model, advance)
        _decode(model, [tuple(prompts[row]) for row in rows], texts)
        found.update(zip(rows, texts.finished(), strict=True))
    return [found[row] for row in range(len(prompts))]


def _group(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, batching: Batching
) -> list[list[int]]:
    """Rows decoded together: the longest first, equal ones side by side, and only such as change nothing of others."""
    groups: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), tuple(prompts[row]), row)):
        fits = bool(groups) and len(groups[-1]) < batch_size
        longest = len(prompts[groups[-1][0]]) if groups else 0
        if not fits or not batching.writes_together(longest, len(prompts[row]), max_new_tokens):
            groups.append([])
        groups[-1].append(row)
    return groups


def _decode(model: Model, prompts: list[tuple[int, ...]], texts: "_Texts") -> None:
    """Let one batch be written; a prompt of several rows is read once where the family's cache can be repeated."""
    read, rows = prompts, None
    if model.anatomy.manner.moves and len(set(prompts)) < len(prompts):
        read = list(dict.fromkeys(prompts))
        places = {prompt: place for place, prompt in enumerate(read)}
        rows = [places[prompt] for prompt in prompts]
    ids, mask = pad_left(read, next(iter(model.eos_ids), 0), model.device)
    decode(model.network, ids, mask, texts.longest, texts, model.anatomy.manner.cached, rows)


class _Texts:
    """The texts of one batch while they are written; the numbers of all rows are chosen at once, on their device."""

    def __init__(self, rules: Sequence[Rule], limits: Sequence[int], model: Model, advance: Advance) -> None:
        self.longest = max(limits)
        self._limits = limits
        self._eos_ids = frozenset(model.eos_ids)
        self._leaves = model.anatomy.manner.moves
        self._advance = advance
        self._tokens: list[list[int]] = [[] for _ in rules]
        self._is_writing = [True] * len(rules)
        self._states: list[Tensor] = []
        self._num_states = 0
        self._places: list[list[int]] = [[] for _ in rules]  # of a row's states, counted through all steps
        self._rows: Rows = range(len(rules))
        self._draws = _Draws(rules, self.longest, model.device)

    def choose(
        self, states: Float[Tensor, "B d"], logits: Float[Tensor, "B V"]
    ) -> tuple[Int64[Tensor, " B"], Rows | None]:
        """The next tokens, and the rows that go on; one copy to the host a step."""
        tokens = logits.argmax(-1)
        self._draws.put(tokens, logits, len(self._states), self._rows)
        self._draws.put_warped(tokens, logits, self._tokens, self._rows)
        self._note(states, tokens.tolist())
        going_on = [place for place, row in enumerate(self._rows) if self._is_writing[row]]
        if going_on and not (self._leaves and len(going_on) <= WORTH_LEAVING * len(self._rows)):
            return tokens, None
        self._rows = [self._rows[place] for place in going_on]
        return tokens, going_on

    def _note(self, states: Tensor, tokens: list[int]) -> None:
        """Take over a step's states and tokens; texts end."""
        steps = 0
        for place, (row, token) in enumerate(zip(self._rows, tokens, strict=True), self._num_states):
            if self._is_writing[row]:
                self._tokens[row].append(token)
                self._places[row].append(place)
                left = self._limits[row] - len(self._tokens[row])
                self._is_writing[row] = left > 0 and token not in self._eos_ids
                steps += 1 if self._is_writing[row] else 1 + left
        self._states.append(states.clone())
        self._num_states += len(states)
        self._advance(steps)

    def finished(self) -> list[Continuation]:
        """The texts, in the order of the rules."""
        states = torch.cat(self._states)
        return [
            Continuation(own, states[places], own[-1] in self._eos_ids)
            for own, places in zip(self._tokens, self._places, strict=True)
        ]


class _Draws:
    """The numbers that decide the draws of those rows of a batch that are sampled."""

    def __init__(self, rules: Sequence[Rule], steps: int, device: torch.device) -> None:
        self._sampled = [row for row, rule in enumerate(rules) if isinstance(rule, Sampled)]
        chosen = [rule for rule in rules if isinstance(rule, Sampled)]
        numbers = np.zeros((len(chosen), steps))
        for own, rule in zip(numbers, chosen, strict=True):
            given = rule.uniforms[:steps]
            own[: len(given)] = given
        self._uniforms = torch.from_numpy(numbers).to(device)
        self._temperatures = torch.tensor([[rule.temperature] for rule in chosen], dtype=torch.float64, device=device)
        self._order = {row: place for place, row in enumerate(self._sampled)}
        self._warped = {row: rule for row, rule in enumerate(rules) if isinstance(rule, Warped)}

    def put(self, tokens: Int64[Tensor, " B"], logits: Float[Tensor, "B V"], step: int, rows: Rows) -> None:
        """Replace the tokens of sampled rows by their draws, a few rows at a time to hold little in float64."""
        drawn = [(place, self._order[row]) for place, row in enumerate(rows) if row in self._order]
        at_once = _rows_at_once(logits)
        for low in range(0, len(drawn), at_once):
            places, own = map(list, zip(*drawn[low : low + at_once], strict=True))
            probs = softmax(logits[places], self._temperatures[own])
            tokens[places] = draw(probs, self._uniforms[own, step])

    def put_warped(
        self, tokens: Int64[Tensor, " B"], logits: Float[Tensor, "B V"], written: Sequence[Sequence[int]], rows: Rows
    ) -> None:
        """Replace the tokens of rows with processors by their draws, row by row: each has a past of its own length."""
        for place, row in enumerate(rows):
            rule, step = self._warped.get(row), len(written[row])
            if rule is None or step >= len(rule.uniforms):
                continue
            seen, scores = torch.tensor([[*rule.prompt, *written[row]]], device=logits.device), logits[place, None]
            for processor in rule.processors:
                scores = processor(seen, scores)
            number = torch.tensor(rule.uniforms[step : step + 1], device=logits.device)
            tokens[place] = draw(softmax(scores, 1.0), number)[0]


def _rows_at_once(logits: Float[Tensor, "B V"]) -> int:
    budget = CPU_DRAWN_AT_ONCE if logits.device.type == "cpu" else GPU_DRAWN_AT_ONCE
    return max(1, budget // logits.shape[1])
