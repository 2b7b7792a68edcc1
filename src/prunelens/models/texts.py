"""Text as token ids for a model to go on from: with what its tokenizer puts in front, without what it puts behind."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from prunelens.models.model import Model

PROBES = ("a", "1", ".")


def text_ids(model: Model, text: str) -> list[int]:
    """Token ids of one text, as `texts_ids`."""
    return texts_ids(model, [text])[0]


def texts_ids(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, with the special tokens that the tokenizer puts in front of a text (a BOS).

    Those it puts behind one (EOS, SEP) would end the text that the model is to continue: they are left off, which
    `model.notes` then tells, once. Such tokens written in the text itself stay.
    """
    rows = model.tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    ending = told_ending(model, texts)
    return [without_ending(list(row), ending) for row in rows]


def told_ending(model: Model, texts: Sequence[str] = ()) -> list[int]:
    """As `added_ending`; where there is one, `model.notes` tells that it is left off."""
    ending = added_ending(model.tokenizer, texts)
    note = _ending_note(model, ending) if ending else None
    if note and note not in model.notes:
        model.notes.append(note)
    return ending


def without_ending(ids: list[int], ending: list[int]) -> list[int]:
    """Token ids without what the tokenizer put behind them."""
    return ids[: -len(ending)] if ending and ids[-len(ending) :] == ending else ids


def added_ending(tokenizer: Any, texts: Sequence[str] = ()) -> list[int]:
    """The special tokens that a tokenizer puts behind every text; empty for most.

    It is asked about short probes, and about the start of `texts` where it has no token for those.
    """
    for probe in chain(PROBES, (text[:64] for text in texts)):
        plain = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(probe)["input_ids"])
        for start in range(len(whole) - len(plain) + 1) if plain else ():
            if whole[start : start + len(plain)] == plain:
                return whole[start + len(plain) :]
    return []


def _ending_note(model: Model, ending: list[int]) -> str:
    tokens = "".join(map(str, model.tokenizer.convert_ids_to_tokens(ending)))
    return (
        f"the tokenizer of {model.name} puts {tokens!r} behind every text; texts are read without it, because it would "
        "end what the model is to continue"
    )
