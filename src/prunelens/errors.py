"""What a user can be told: an error that says what was expected, what was found, and what to do next."""

import unicodedata


class PrunelensError(Exception):
    """A mistake in the input or a limit of the environment; the command line prints it and exits with 2."""


def printable(text: str) -> str:
    """Text without control characters, so that no model or file can steer the terminal."""
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf") else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )


def has_half_pair(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which no tokenizer or table can take."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)
