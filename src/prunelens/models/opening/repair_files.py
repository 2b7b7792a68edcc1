"""How a checkpoint carries repairs: a bias in a parameter that is there anyway, else tensors in a file of their own.

The file lies beside the weights, `config.json` says where each repair belongs. A program that does not know of it
loads the checkpoint without them.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.models.surgery.repairs import STREAM, Repair

KEY = "prunelens"
REPAIRS = "prunelens-repairs.safetensors"
FIELDS = ("bias", "down", "up")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def describe(repairs: Sequence[Repair], in_biases: dict[int, str]) -> list[dict[str, Any]]:
    """The list `repairs` of the entry in config.json."""
    return [
        {"kind": repair.kind, "layer_idx": repair.layer_idx}
        | ({"parameter": in_biases[index]} if index in in_biases else {})
        for index, repair in enumerate(repairs)
    ]


def save_repairs(repairs: Sequence[Repair], in_biases: Collection[int], folder: Path) -> None:
    """Write the tensors of repairs that no parameter carries."""
    tensors = {
        f"{index}.{field}": value.detach().cpu().contiguous()
        for index, repair in enumerate(repairs)
        for field in FIELDS
        if index not in in_biases and (value := getattr(repair, field)) is not None
    }
    if tensors:
        save_file(tensors, folder / REPAIRS, metadata={"format": "pt"})


def read_repairs(network: Any, size: int, folder: Path | None) -> list[tuple[Repair, bool]]:
    """The repairs of a checkpoint, and whether a parameter of the network carries each; none without a record.

    Args:
        network: the opened network.
        size: its hidden size.
        folder: the checkpoint.

    Raises:
        PrunelensError: a record or a file that this program does not write.
    """
    record = getattr(network.config, KEY, None)
    entries = record.get("repairs", []) if isinstance(record, dict) else []
    if not isinstance(entries, list):
        raise unexpected("a list of repairs", entries)
    layers = network.config.get_text_config(decoder=True).num_hidden_layers
    tensors = _tensors(folder) if any(not _parameter(entry) for entry in entries) else {}
    found = [_read(network, entry, index, tensors, size, layers) for index, entry in enumerate(entries)]
    places = [(repair.kind, repair.layer_idx) for repair in found]
    if len(set(places)) < len(places):
        raise unexpected("one repair for each place", places)
    return [(repair, bool(_parameter(entry))) for repair, entry in zip(found, entries, strict=True)]


def _parameter(entry: Any) -> Any:
    return entry.get("parameter") if isinstance(entry, dict) else None


def _tensors(folder: Path | None) -> dict[str, Tensor]:
    if folder is None or not (folder / REPAIRS).is_file():
        raise PrunelensError(f"expected {REPAIRS} beside the weights, as config.json says, found none; download it too")
    try:
        found = load_file(folder / REPAIRS)
    except (SafetensorError, OSError) as error:
        raise PrunelensError(f"{folder / REPAIRS} is damaged or cut short ({error}); download it again") from error
    for name, tensor in found.items():
        if tensor.dtype not in DTYPES:
            raise PrunelensError(
                f"expected {', '.join(map(str, DTYPES))} in {folder / REPAIRS}, found {tensor.dtype} in {name!r}"
            )
    return found


def _read(network: Any, entry: Any, index: int, tensors: dict[str, Tensor], size: int, layers: int) -> Repair:
    kind, layer_idx, name = (
        (entry.get(key) for key in ("kind", "layer_idx", "parameter")) if isinstance(entry, dict) else (None,) * 3
    )
    most = layers if kind == STREAM else layers - 1
    if kind not in ("attention", "mlp", STREAM) or type(layer_idx) is not int or not 0 <= layer_idx <= most:
        raise unexpected("repairs of attention, mlp or stream at one of its layers", entry)
    weight = network.get_input_embeddings().weight
    if name is not None:
        try:
            bias = network.get_parameter(name)
        except (AttributeError, TypeError) as error:
            raise unexpected("a parameter of the model", name) from error
        values = [bias.detach(), None, None]
    else:
        values = [tensors.get(f"{index}.{field}") for field in FIELDS]
    bias, down, up = (None if value is None else value.to(weight.device, weight.dtype) for value in values)
    shapes = [None if value is None else tuple(value.shape) for value in values]
    rank = shapes[1][-1] if shapes[1] else size
    maps = ([(size,), None, None], [(size,), (size, size), None], [(size,), (size, rank), (rank, size)])
    if bias is None or shapes not in maps:
        raise unexpected(f"tensors of a map of {size} values for repair {index}", shapes)
    if not all(bool(torch.isfinite(one).all()) for one in (bias, down, up) if one is not None):
        raise PrunelensError(f"repair {index} holds NaN or infinite values; the file {REPAIRS} is damaged")
    return Repair(str(kind), layer_idx, bias, down, up)


def unexpected(expected: str, found: Any) -> PrunelensError:
    """What is said of an entry in config.json that this program does not write."""
    shown = repr(found)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    return PrunelensError(
        f"expected {expected} in the entry {KEY!r} of config.json, found {shown}; remove the entry, or download the "
        "checkpoint again"
    )
