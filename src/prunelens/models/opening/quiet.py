"""What surrounds the libraries while a checkpoint opens: they stay silent, and whatever they raise is one sentence."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers

from prunelens.errors import PrunelensError
from prunelens.models.placement import is_out_of_memory

LONGEST = 240
"""Characters of what a library says."""


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn any error of a library into one sentence.

    Args:
        what: how the sentence begins.

    Raises:
        PrunelensError: the body has raised; running out of memory passes through.
    """
    try:
        yield
    except PrunelensError:
        raise
    except Exception as error:  # libraries raise anything when they read a damaged or hostile file
        if is_out_of_memory(error):
            raise
        hint = "; pass --trust-remote-code to run it" if "trust_remote_code" in str(error) else ""
        if "on the meta device" in str(error):
            hint = "; the map of devices must put tied weights, often the embedding and the head, together"
        raise PrunelensError(f"{what}: {reason_of(error)}{hint}") from error


def reason_of(error: BaseException) -> str:
    """What an error says, on one line, cut at a word where it is long."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError | AttributeError | IndexError) or not text:
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rpartition(' ')[0] or text[:LONGEST]} …"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and remarks of transformers and accelerate off the terminal while a model opens."""
    remarks = logging.getLogger("accelerate")
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        remarks.setLevel(level)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
