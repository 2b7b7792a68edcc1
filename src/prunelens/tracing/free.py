"""L4: a model continues by itself, and how far couplings with the dense model's sampled texts agree (S3').

While both texts are the same, writing is reading: what a compressed model chooses there is known from its
teacher-forced pass over the dense text (L3). Only what comes after its first other choice has to be written.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from prunelens.models.model import Model
from prunelens.progress import Advance, unreported
from prunelens.tracing.generate import Continuation, Greedy, Rule, Sampled, uniforms, write

NUM_COUPLINGS = 16


def write_dense(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    advance: Advance = unreported,
) -> tuple[list[Continuation], list[Continuation]]:
    """The dense model's greedy and sampled continuations of each prompt, decoded side by side."""
    rules: list[Rule] = []
    for prompt, repeat in zip(prompts, _repeats(prompts), strict=True):
        numbers = uniforms(seed, "sample", prompt, repeat, max_new_tokens)
        rules += [Greedy(), Sampled(numbers, temperature)]
    rows = [prompt for prompt in prompts for _ in range(2)]
    written = write(model, rows, rules, max_new_tokens, batch_size, advance)
    return written[::2], written[1::2]


def first_other(token_ids: Sequence[int], own: Int64[Tensor, " steps"], same_top1: Bool[Tensor, " steps"]) -> int:
    """Steps of a dense greedy text before a model that reads it chooses another token; all of them if it never does.

    Where the dense model itself, reading, chooses the other token too, the two tokens are so close that the shape of
    the pass decides between them: that is rounding, and the dense text goes on.

    Args:
        token_ids: the dense greedy text.
        own: what the model that reads it finds most likely at each step.
        same_top1: whether the dense model, reading, finds the same token most likely.
    """
    pairs = zip(token_ids, own.tolist(), same_top1.tolist(), strict=True)
    return next(
        (step for step, (token, other, same) in enumerate(pairs) if other != token and not same), len(token_ids)
    )


def write_free(
    model: Model,
    prompts: Sequence[Sequence[int]],
    dense: Sequence[Continuation],
    known: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    advance: Advance = unreported,
) -> list[Continuation]:
    """A compressed model's greedy continuations, written from its first other choice on.

    Texts whose positions depend on their length are read otherwise than they are written, and are written from the
    prompt on.

    Args:
        model: the compressed model as it runs now.
        prompts: token ids, one a text.
        dense: the dense model's greedy continuations.
        known: for each of them the steps at which the compressed model is known to choose its token (`first_other`).
        max_new_tokens: length of a text at most.
        batch_size: rows decoded together.
        advance: called with the number of steps finished; those that need no writing are finished at once.

    Returns:
        The whole texts, with the states of the steps that were written.
    """
    alike = model.anatomy.manner.alike_up_to
    known = [
        start if len(prompt) + max_new_tokens <= alike else 0 for prompt, start in zip(prompts, known, strict=True)
    ]
    given = [text.token_ids[:start] for text, start in zip(dense, known, strict=True)]
    left = [row for row, text in enumerate(dense) if len(given[row]) < len(text.token_ids)]
    limits = [max_new_tokens - known[row] for row in left]
    advance(len(prompts) * max_new_tokens - sum(limits))
    rows = [[*prompts[row], *given[row]] for row in left]
    written = dict(zip(left, write(model, rows, [Greedy()] * len(rows), limits, batch_size, advance), strict=True))
    return [
        Continuation([*start, *written[row].token_ids], written[row].states, written[row].ended, len(start))
        if row in written
        else Continuation(list(text.token_ids), text.states[:0], text.ended, len(text.token_ids))
        for row, (text, start) in enumerate(zip(dense, given, strict=True))
    ]


def couple(
    prompts: Sequence[Sequence[int]],
    sampled: Sequence[Continuation],
    acceptance: Sequence[Float[np.ndarray, " _"]],
    max_new_tokens: int,
    seed: int,
) -> list[list[int]]:
    """How many tokens each coupling of a model with the dense model's sampled texts agrees on (S3').

    An optimal coupling, token by token, keeps the dense model's token x with probability min(1, p'(x)/p(x)).
    Otherwise its next token is a draw from the normalised positive part of p' - p, which never is x: the texts have
    diverged. Until then both are the same, so the pass over the dense text holds all that decides. An agreed EOS
    counts as agreement up to `max_new_tokens`, since both texts have ended.

    Args:
        prompts: token ids, one a text.
        sampled: the dense model's sampled continuations.
        acceptance: min(1, p'(x)/p(x)) of each of their tokens (S1).
        max_new_tokens: length of a text at most.
        seed: of the couplings.

    Returns:
        For each text `NUM_COUPLINGS` agreed lengths.
    """
    found = []
    for prompt, repeat, text, accepted in zip(prompts, _repeats(prompts), sampled, acceptance, strict=True):
        numbers = uniforms(seed, "coupling", prompt, repeat, max_new_tokens * NUM_COUPLINGS)
        kept = numbers.reshape(max_new_tokens, NUM_COUPLINGS)[: len(accepted)] < accepted[:, np.newaxis]
        agreed = np.logical_and.accumulate(kept).sum(axis=0).tolist()
        found.append(_count_end(agreed, text, max_new_tokens))
    return found


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
