"""Repetition: distinct n-grams by counting, and loops by their definition and at its edges."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelens.metrics.repetition import distinct_share, is_loop

TOKENS = st.lists(st.integers(0, 3), max_size=14)


def fresh(count: int, start: int = 0) -> list[int]:
    """Tokens of which none comes twice."""
    return list(range(1000 + start, 1000 + start + count))


def naive_loop(tokens: list[int]) -> bool:
    """The definition, one 8-gram at a time: positions in the second half whose last 8 tokens stood earlier."""
    if len(tokens) < 48:
        return False
    again = []
    for last in range(len(tokens) // 2, len(tokens)):
        gram = tokens[last - 7 : last + 1]
        again.append(any(tokens[end - 7 : end + 1] == gram for end in range(7, last)))
    return 2 * sum(again) >= len(again)


@settings(deadline=None)
@given(tokens=TOKENS, n=st.integers(1, 4))
def test_distinct_share_by_counting(tokens: list[int], n: int) -> None:
    found = distinct_share(tokens, n)
    grams = ["-".join(map(str, tokens[start : start + n])) for start in range(len(tokens) - n + 1)]
    if not grams:
        assert found is None
        return
    firsts = [place for place, gram in enumerate(grams) if gram not in grams[:place]]
    assert found == len(firsts) / len(grams)
    assert 0 < found <= 1


def test_distinct_share_by_hand() -> None:
    assert distinct_share([1, 2, 1, 2, 1], 2) == 2 / 4
    assert distinct_share([7] * 10, 3) == 1 / 8
    assert distinct_share(fresh(9), 3) == 1
    assert distinct_share([1, 2, 3], 3) == 1
    assert distinct_share([1, 2], 3) is None
    assert distinct_share([], 1) is None
    # the tokens count, not their digits
    assert distinct_share([1, 11, 1, 11, 111], 2) == 3 / 4
    assert distinct_share((5, 6, 5, 6), 2) == 2 / 3


@pytest.mark.parametrize("length", range(1, 21))
def test_a_cycle_after_a_start_is_a_loop(length: int) -> None:
    generator = random.Random(length)
    for start in (0, 5, 30):
        own = [generator.randrange(50_000) for _ in range(start)]
        cycle = [generator.randrange(50_000) for _ in range(length)]
        tokens = (own + 200 * cycle)[:150]
        assert is_loop(tokens)
        assert is_loop(tuple(tokens))


@pytest.mark.parametrize("seed", range(5))
def test_random_tokens_are_no_loop(seed: int) -> None:
    generator = random.Random(seed)
    for size in (20, 1000, 50_000):
        assert not is_loop([generator.randrange(size) for _ in range(256)])


def test_short_texts_never_count() -> None:
    for count in range(48):
        assert not is_loop([7] * count)
    assert is_loop([7] * 48)


@pytest.mark.parametrize("copied", [18, 19])
def test_half_of_the_second_half_is_enough(copied: int) -> None:
    """24 of 48 ends lie in the second half; copying 19 tokens at the end repeats 12 of their 8-grams, 18 repeat 11."""
    tokens = fresh(48 - copied)
    tokens += tokens[:copied]
    assert is_loop(tokens) is (copied == 19)


def test_what_comes_once_more_in_the_first_half_does_not_count() -> None:
    assert not is_loop([7] * 60 + fresh(60))
    assert is_loop(fresh(60) + [7] * 60)
    # what is repeated may have stood anywhere before
    assert is_loop(fresh(60) + fresh(60))


@pytest.mark.parametrize(("phrase", "expected"), [(7, False), (14, False), (15, True), (20, True)])
def test_phrases_between_new_tokens(phrase: int, expected: bool) -> None:
    """Of the p + 1 8-grams of each turn those p - 7 repeat that lie within the phrase: half of them for p = 15."""
    tokens = [token for turn in range(30) for token in (*range(phrase), 5000 + turn)]
    assert is_loop(tokens) is expected


@settings(deadline=None, max_examples=200)
@given(pieces=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=9))
def test_loops_by_the_definition(pieces: list[tuple[int, int]]) -> None:
    """Texts put together from pieces of one text."""
    tokens = [token for start, length in pieces for token in fresh(length, start)]
    assert is_loop(tokens) is naive_loop(tokens)
