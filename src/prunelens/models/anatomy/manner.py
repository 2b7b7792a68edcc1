"""Which rows may share a batch, proved on real numbers: read side by side and continued side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunelens.models.anatomy.hooks import decoder_of, run_decoder
from prunelens.models.anatomy.proofs import UnprovedError, difference, is_close, tolerated, tolerating
from prunelens.models.batches import ANY_LENGTH, Batching, pad_left, pad_right
from prunelens.models.decoding import Rows, decode
from prunelens.models.placement import input_device, is_out_of_memory

NEW_TOKENS = 3
MOVES = ((2, 0, 1, 1), (1, 3, 0))
"""How three rows change places after their first tokens: one is doubled, and leaves again."""
ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.2, torch.bfloat16: 0.2}
"""Shares by which states differ when the same tokens run in another shape: a rounded router may choose otherwise."""
BESIDE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 0.1, torch.bfloat16: 0.1}
"""The same where only the other rows change, and for a padded prompt where what is not padded differs by a fifth."""
TWINS = {torch.float64: 1e-7, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}
"""Shares by which a prompt's states differ from those of the same prompt in the same batch after other padding."""


@dataclass(frozen=True)
class Manner:
    """How a model is run so that a text's numbers are its own.

    Attributes:
        batching: which rows may share a batch.
        cached: whether its cache gives the states that a whole pass gives; else every token takes a whole pass.
        moves: whether rows may leave a batch that is being written, and be repeated in it.
        alike_up_to: tokens up to which the length of a text changes no position.
        notes: remarks for a reader of the results.
    """

    batching: Batching
    cached: bool
    moves: bool
    alike_up_to: int
    notes: tuple[str, ...]


def prove_manner(model: Any, ids: Tensor, alike_up_to: int | None, context_length: int | None) -> Manner:
    """Let a short text be read and continued alone, beside a longer one and beside one of its length.

    Args:
        model: the transformers model.
        ids: a text, (1, T).
        alike_up_to: tokens up to which the length of a text changes no position, or None.
        context_length: tokens that a text may have, or None.

    Raises:
        UnprovedError: it cannot write, or what it writes is not what it reads.
    """
    limit = ANY_LENGTH if alike_up_to is None else alike_up_to
    text = ids[0].tolist()
    others_count = tolerated() > 0  # the whole batch decides how each of its numbers is rounded
    with tolerating(ROUNDING.get(model.dtype, 0.2)):
        moves = not others_count and _all_agree(model, text[:3], text, moving=True)
        if moves or (not others_count and _all_agree(model, text[:3], text, moving=False)):
            cached, together, reads, writes = True, True, True, True
        else:
            cached, whole, read = _prove_writing(model, text)
            together = not others_count and _reads_beside(model, whole, whole[::-1], read)
            reads = together and _reads_beside(model, whole, [*text, *text], read)
            writes = together and _writes_beside(model, text[:3], text, cached)
    batching = Batching(limit if reads else 0, limit if writes else 0, together)
    reached = alike_up_to if context_length is None or limit < context_length else None
    return Manner(batching, cached, moves, limit, tuple(_notes(batching, cached, reached)))


def _notes(batching: Batching, cached: bool, alike_up_to: int | None) -> Iterator[str]:
    if not batching.together:
        yield "other texts in a batch change this model's numbers, so every text is read and written alone"
    elif batching.read_up_to == 0:
        yield "tokens after a text change this model's numbers, so texts of other lengths are read separately"
    elif batching.written_up_to == 0:
        yield "padding on the left changes this model's numbers, so prompts of other lengths are continued separately"
    if not cached:
        yield "this model's cache does not give the states of a whole pass, so every token is written by a whole pass"
    if alike_up_to is not None:
        yield (
            f"beyond {alike_up_to} tokens this model's positions depend on the length of the text: each text is read "
            "as it stands at its end, which is not how the model saw its beginning while it wrote"
        )


def _all_agree(model: Any, short: list[int], long: list[int], moving: bool) -> bool:
    """Whether all ways give the same states, so that nothing more need be tried.

    Prompts are continued side by side, padded on the left, and where they move they change places and one of them is
    there twice for a step; what was written is read side by side, padded on the right; and the longer text is read
    alone.
    """
    try:
        written, states = _decode(model, [short, long, short], cached=True, moves=MOVES if moving else ())
    except Exception as fault:  # a family's own code may raise anything
        if is_out_of_memory(fault):
            raise
        return False
    texts = [[*prompt, *row[:-1]] for prompt, row in zip((short, long, short), written, strict=True)]
    alone = _read(model, texts[1])
    ids, _ = pad_right(texts, alone.device)
    read = run_decoder(decoder_of(model), ids)
    ends = [own[len(text) - NEW_TOKENS : len(text)] for text, own in zip(texts, read, strict=True)]
    return (
        is_close(read[1], alone)
        and _padding_is_nothing(model.dtype, states, ends)
        and _others_are_nothing(model, ids, 1, read[1])
    )


def _prove_writing(model: Any, prompt: list[int]) -> tuple[bool, list[int], Tensor]:
    """(Whether the cache is right, the prompt with what was written, all but the last token, and its states)."""
    found = ""
    for cached in (True, False):
        try:
            written, states = _decode(model, [prompt], cached)
        except Exception as fault:  # a family's own code may raise anything
            if is_out_of_memory(fault):
                raise
            found = f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
            continue
        whole = [*prompt, *written[0][:-1]]
        read = _read(model, whole)
        if is_close(states[0], read[-NEW_TOKENS:]):
            return cached, whole, read
        found = "other numbers"
    raise UnprovedError(f"expected to write a short text with the states that it is read with, found {found}")


def _read(model: Any, text: list[int]) -> Tensor:
    """States, (T, d), of a text read alone."""
    return run_decoder(decoder_of(model), torch.tensor([text], device=input_device(model)))[0]


class _Greedy:
    """Writes the most likely tokens of three rows, and lets them move after each step."""

    def __init__(self, prompts: int, moves: Sequence[Rows]) -> None:
        self._order = list(range(prompts))
        self._moves = moves
        self.tokens: list[list[int]] = [[] for _ in self._order]
        self.states: list[list[Tensor]] = [[] for _ in self._order]

    def choose(self, states: Tensor, logits: Tensor) -> tuple[Tensor, Rows | None]:
        tokens = logits.argmax(-1)
        for row in range(len(self.tokens)):
            place = self._order.index(row)
            self.tokens[row].append(int(tokens[place]))
            self.states[row].append(states[place].clone())
        step = len(self.tokens[0])
        if step > len(self._moves):
            return tokens, None
        self._order = [self._order[place] for place in self._moves[step - 1]]
        return tokens, self._moves[step - 1]


def _decode(
    model: Any, prompts: list[list[int]], cached: bool, moves: Sequence[Rows] = ()
) -> tuple[list[list[int]], Tensor]:
    pad = prompts[0][-1]  # the token for padding may be all zeros
    ids, mask = pad_left(prompts, pad, input_device(model))
    ids[0, mask[0] == 0] = pad - 1 if pad else 1
    writer = _Greedy(len(prompts), moves)
    decode(model, ids, mask, NEW_TOKENS, writer, cached)
    return writer.tokens, torch.stack([torch.stack(states) for states in writer.states])


def _reads_beside(model: Any, text: list[int], other: list[int], expected: Tensor) -> bool:
    """Whether a text has the same states before and after another in a batch."""
    ids, _ = pad_right([text, other, text], expected.device)
    states = run_decoder(decoder_of(model), ids)[:, : len(text)]
    alike = is_close(states[0], expected) and is_close(states[2], expected)
    return alike and _others_are_nothing(model, ids, 0, states[0])


def _others_are_nothing(model: Any, ids: Tensor, row: int, states: Tensor) -> bool:
    """Whether a row of a batch keeps its states where the tokens of all others are turned round by one."""
    changed = ids.roll(1, dims=1)
    changed[row] = ids[row]
    found = run_decoder(decoder_of(model), changed)[row, : len(states)]
    return difference(found, states) <= BESIDE.get(model.dtype, 0.1)


def _writes_beside(model: Any, short: list[int], long: list[int], cached: bool) -> bool:
    """Whether prompts are continued side by side as they are read alone; a model that cannot does not."""
    try:
        written, states = _decode(model, [short, long, short], cached)
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        return False
    texts = [[*prompt, *row[:-1]] for prompt, row in zip((short, long, short), written, strict=True)]
    return texts[0] == texts[2] and _padding_is_nothing(
        model.dtype, states, [_read(model, text)[-NEW_TOKENS:] for text in texts]
    )


def _padding_is_nothing(dtype: torch.dtype, states: Tensor, expected: Sequence[Tensor]) -> bool:
    """Whether padded prompts (the first and the last, which are one prompt) differ only as rounding differs.

    In low precision rounding hides much, so the two are held against one another, too: nothing but the padding is
    another between them.
    """
    rounding = difference(states[1], expected[1])
    allowed = min(ROUNDING.get(dtype, 0.2), max(BESIDE.get(dtype, 0.1), 5 * rounding))
    padded = (difference(own, one) <= allowed for own, one in zip(states[::2], expected[::2], strict=True))
    twins = difference(states[2], states[0]) <= TWINS.get(dtype, 2e-3)
    return is_close(states[1], expected[1]) and twins and all(padded)
