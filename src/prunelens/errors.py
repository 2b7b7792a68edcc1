"""What a user can be told: an error that says what was expected, what was found, and what to do next."""

import difflib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST_SENTENCE = 1_000
"""Characters of an error; what is longer holds somebody's text, and its middle is left out."""
LONGEST_VALUE = 120
LARGEST = 10**9
"""Of a count: more items, tokens or rows are a slip of the finger."""
LARGEST_SEED = 2**32 - 1
"""What numpy, torch and transformers all take."""
UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories that steer a terminal, turn the direction of a line, hide, end a line, or cannot be encoded."""


class PrunelensError(Exception):
    """A mistake in the input or a limit of the environment; the command line prints it and exits with 2."""

    def __init__(self, sentence: str) -> None:
        super().__init__(cut(sentence, LONGEST_SENTENCE))


def cut(text: str, limit: int) -> str:
    """At most `limit` characters, the middle left out: names often differ at the end."""
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 1]}…{text[-tail:]}"


def printable(text: str) -> str:
    """Text without control, direction and zero-width characters, so that no model or file can steer the terminal."""
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) not in UNSAFE else "\N{REPLACEMENT CHARACTER}"
        for letter in text
    )


def one_line(text: Any) -> str:
    """The same on one line: names and paths."""
    return printable(" ".join(str(text).split()))


def shown(value: Any, limit: int = LONGEST_VALUE) -> str:
    """A foreign value as it stands in a sentence: quoted, on one line, its middle left out where it is long.

    What is no text, number, bool or null is named by its type alone.
    """
    if isinstance(value, str):
        return repr(printable(cut(value, limit)))
    if isinstance(value, list | dict) and not value:
        return str(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value) if value.bit_length() < 4 * limit else f"a number of {value.bit_length()} bits"
    if isinstance(value, float):
        return repr(value)
    names: dict[type, str] = {dict: "an object", list: "a list", tuple: "a list"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def nearest(name: str, known: Iterable[str], likeness: float = 0.5) -> str:
    """` (did you mean …?)`, or nothing where no known name is near."""
    found = difflib.get_close_matches(name[:LONGEST_VALUE], list(known), 1, likeness)
    return f" (did you mean {found[0]}?)" if found else ""


def check_keys(found: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse a key that nothing reads.

    Raises:
        PrunelensError: an unknown key, with the nearest known one.
    """
    known = list(known)
    for key in found:
        if key not in known:
            raise PrunelensError(
                f"{where}: there is no key {shown(key)}{nearest(str(key), known)}; known keys: {', '.join(known)}"
            )


def check_whole(name: str, value: Any, low: int, high: int = LARGEST) -> None:
    """Refuse what is no whole number of a range.

    Raises:
        PrunelensError: true, a fraction, text, or a number outside.
    """
    if type(value) is not int:
        raise PrunelensError(f"expected {name} to be a whole number, found {shown(value)}")
    if value < low:
        raise PrunelensError(f"expected {name} of at least {low}, found {shown(value)}")
    if value > high:
        raise PrunelensError(f"expected {name} of at most {high}, found {shown(value)}")


def check_seed(value: Any) -> None:
    """Refuse a seed that not every random generator takes.

    Raises:
        PrunelensError: as `check_whole`.
    """
    check_whole("a seed", value, 0, LARGEST_SEED)


def check_real(name: str, value: Any, low: float, high: float) -> None:
    """Refuse what is no number from `low` to `high`.

    Raises:
        PrunelensError: true, text, NaN, or a number outside.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PrunelensError(f"expected {name} to be a number, found {shown(value)}")
    if not low <= value <= high:
        raise PrunelensError(f"expected {name} from {low:g} to {high:g}, found {shown(value)}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither true nor false.

    Raises:
        PrunelensError: as said.
    """
    if not isinstance(value, bool):
        raise PrunelensError(f"expected {name} to be true or false, found {shown(value)}")


def check_word(name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse a word that is not known.

    Raises:
        PrunelensError: another one, with the nearest known one.
    """
    if value not in known:
        hint = nearest(value, known) if isinstance(value, str) else ""
        raise PrunelensError(f"expected {name} of {', '.join(known)}, found {shown(value)}{hint}")


def has_half_pair(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, which no tokenizer or table can take."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)
