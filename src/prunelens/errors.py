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
