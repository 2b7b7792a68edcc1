"""What config.json and generation_config.json claim: token ids and sizes, checked before anything is made of them."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from prunelens.errors import PrunelensError
from prunelens.models.sizes import StoredTensor

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKEN_IDS = ("eos_token_id", "pad_token_id")
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
LARGEST = 10**12
COUNTED = re.compile(r"(^|_)(layers?|experts?|depths?|blocks)$")
"""Keys that say how many parts a network is made of."""
MANY = 2048
"""Parts that a small checkpoint may claim; a larger one has at least a tensor for each."""
BUFFERS = 1 << 30
"""Bytes of tables that no file stores, such as positions and masks."""


def check_claims(values: dict[str, Any], path: Path, stored: Sequence[StoredTensor]) -> None:
    """Refuse a config.json that would be misread, or that asks for more parts than the weights can hold.

    Args:
        values: its content.
        path: the checkpoint.
        stored: what its weight files hold.

    Raises:
        PrunelensError: no model_type, or a number of parts that is absurd.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise PrunelensError(
            f'expected "model_type" in {path / CONFIG} to name a model family, found {_shown(kind)}; without it the '
            "name of the folder would decide"
        )
    most = max(MANY, len(stored))
    for key, value in _entries(values):
        if COUNTED.search(key) and _is_number(value) and value > most:
            raise PrunelensError(
                f"{path / CONFIG} asks for {key} of {_shown(value)}, and its weight files hold {len(stored)} tensors; "
                "the configuration is damaged or belongs to another checkpoint"
            )


def check_sizes(config: Any, path: Path) -> None:
    """Refuse sizes of the decoder that no model has.

    Raises:
        PrunelensError: a size that is no whole number above 0.
    """
    text = config.get_text_config(decoder=True)
    for key in SIZES:
        value = getattr(text, key, 1)
        sizes = value if isinstance(value, list | tuple) else [value]  # some families have a number for each layer
        if not all(type(one) is int and 0 < one < LARGEST for one in sizes if one is not None):
            raise PrunelensError(
                f"expected {key} in {path / CONFIG} to be a whole number from 1 to below 10^12, found {_shown(value)}; "
                "download the checkpoint again"
            )


def check_token_ids(values: dict[str, Any], vocab_size: int | None, where: object) -> None:
    """Refuse ids of the end of a text and of padding that are no tokens.

    Args:
        values: settings by name.
        vocab_size: how many tokens there are; None if that is not known, then only kinds are checked.
        where: what to call the place in the message.

    Raises:
        PrunelensError: text, fractions, truth values, nested lists, or ids outside the vocabulary.
    """
    for key in TOKEN_IDS:
        found = values.get(key)
        ids = found if key == "eos_token_id" and isinstance(found, list | tuple) else [found]
        for one in ids:
            if one is None and not isinstance(found, list | tuple):
                continue
            if type(one) is not int:
                raise PrunelensError(
                    f"expected {key} in {where} to be a token id, found {_shown(one)}; set it to a whole number or null"
                )
            if one < 0 or (vocab_size is not None and one >= vocab_size):
                room = "of the vocabulary" if vocab_size is None else f"from 0 to {vocab_size - 1}"
                raise PrunelensError(
                    f"expected {key} in {where} to be a token id {room}, found {_shown(one)}; set it to a token of the "
                    "vocabulary or to null"
                )


def check_fits(network: Any, stored: Sequence[StoredTensor], is_quantized: bool, path: Path) -> None:
    """Refuse a configuration that asks for far more than the weights hold, before memory is taken for it.

    Args:
        network: made of the configuration on the meta device.
        stored: what the weight files hold.
        is_quantized: whether one stored number may stand for several.
        path: the checkpoint.

    Raises:
        PrunelensError: as said.
    """
    asked = sum(weight.numel() for weight in network.parameters())
    num_bytes = sum(tensor.num_bytes for tensor in stored)
    there = 8 * num_bytes if is_quantized else sum(tensor.numel for tensor in stored)
    tables = sum(buffer.numel() * buffer.itemsize for buffer in network.buffers())
    if asked > 2 * there + MANY or tables > max(BUFFERS, num_bytes):
        what = f"{asked:,} numbers" if asked > 2 * there + MANY else f"tables of {tables:,} bytes"
        raise PrunelensError(
            f"{path / CONFIG} asks for {what}, and the weight files hold {num_bytes:,} bytes; the configuration is "
            "damaged or belongs to another checkpoint"
        )


def made_without_numbers(make: Any, config: Any) -> Any:
    """A network of a configuration on the meta device, where it takes no memory."""
    with torch.device("meta"):
        return make(config)


def _entries(values: Any) -> Iterator[tuple[str, Any]]:
    """All settings by name, nested ones too."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield key, value
            yield from _entries(value)
    elif isinstance(values, list):
        for value in values:
            yield from _entries(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a number of more than 30 digits"
    return text if len(text) <= 60 else f"{text[:57]}…"
