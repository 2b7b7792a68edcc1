"""Texts of single tokens, as the page shows them."""

import pytest

from prunelens.study.compare.tables import _token_text


class _SentencePiece:
    """Decodes as SentencePiece does: the space a word begins with is lost when it stands alone."""

    pieces = ("\N{LOWER ONE EIGHTH BLOCK}word", "ing", "\N{LOWER ONE EIGHTH BLOCK}", "<eos>")

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.pieces[token]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[token] for token in ids).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").removeprefix(" ")


@pytest.mark.parametrize(("token", "text"), [(0, " word"), (1, "ing"), (2, " "), (3, "<eos>")])
def test_a_token_keeps_the_space_it_begins_with(token: int, text: str) -> None:
    assert _token_text(_SentencePiece(), token) == text
