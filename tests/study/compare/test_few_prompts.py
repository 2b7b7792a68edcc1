"""Few prompts are said to be few, with a number."""

import pytest

from prunelens.study.compare.describe import ENOUGH_PROMPTS, few_prompts


@pytest.mark.parametrize("count", [1, 16, ENOUGH_PROMPTS - 1])
def test_few_prompts_warn_with_a_number(count: int) -> None:
    (note,) = few_prompts(count)
    assert note.startswith(f"{count} prompts: below 48")


def test_enough_prompts_do_not() -> None:
    assert few_prompts(ENOUGH_PROMPTS) == []
