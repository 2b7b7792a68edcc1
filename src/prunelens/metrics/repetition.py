"""How much a text repeats itself, from its tokens alone."""

from collections.abc import Sequence

LOOP_NGRAM = 8
LOOP_MIN_TOKENS = 48
LOOP_SHARE = 0.5


def distinct_share(tokens: Sequence[int], n: int) -> float | None:
    """Distinct n-grams over all n-grams (distinct-n), in (0, 1]; None for a text of fewer than n tokens."""
    grams = _ngrams(tokens, n)
    return len(set(grams)) / len(grams) if grams else None


def is_loop(tokens: Sequence[int]) -> bool:
    """Whether a text ends in a loop.

    At least half of the 8-grams that end in its second half have stood in the text before; texts of fewer than 48
    tokens never count.
    """
    if len(tokens) < LOOP_MIN_TOKENS:
        return False
    seen: set[tuple[int, ...]] = set()
    repeated = counted = 0
    for end, gram in enumerate(_ngrams(tokens, LOOP_NGRAM), LOOP_NGRAM):
        if end > len(tokens) // 2:
            counted += 1
            repeated += gram in seen
        seen.add(gram)
    return repeated >= LOOP_SHARE * counted


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
