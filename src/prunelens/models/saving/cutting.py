"""The configuration of a model without some of its blocks, and the proof that the blocks that stay keep their settings.

Families say in many ways what a layer is: lists with an entry a layer, lists of indices, counts of leading dense
layers, periods. What is known is rewritten for the new numbering. Nothing is believed: networks without weights are
built from the configuration before and after, and each block that stays must come out as it was.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from prunelens.errors import PrunelensError

COUNT_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LEADING_COUNTS = ("first_k_dense_replace", "num_dense_layers")
"""How many layers at the beginning are dense."""
INDEX_LISTS = (
    "mlp_only_layers",
    "moe_layers",
    "full_attn_idxs",
    "attn_layer_indices",
    "hybrid_layer_ids",
    "cross_attention_layers",
)
"""Lists of layers by index."""
LAYER_WORDS = ("layer", "block", "pattern")
"""A list with an entry a layer says so in its name, or is one of these."""
LAYER_LISTS = ("intermediate_size", "num_query_heads", "num_kv_heads", "ffn_multipliers")
PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))
STALE = ("quantization_config", "_pre_quantization_dtype", "_name_or_path", "transformers_version")
PLACES = ("layer_idx", "layer_id", "layer_number", "training")
"""Attributes of a module that may differ from those of the block it stands for."""

Plain = int | float | str | None


def clean_config(config: Any) -> Any:
    """A copy of a configuration as it comes back from config.json, without leftovers of quantised weights."""
    values = _values(config)
    return _rebuilt(config, {key: value for key, value in values.items() if key not in STALE})


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """The configuration with only these layers, renumbered from 0.

    Raises:
        PrunelensError: the layers that stay cannot be said in this family's settings.
    """
    values = _values(config)
    section = _decoder_section(config, values)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    _say_dense_layers(section, layers)
    for period, offset in PERIODS:
        if isinstance(section.get(period), int) and isinstance(section.get(offset), int):
            section[period], section[offset] = _new_period(section, period, offset, kept)
    _renumber(section, kept, layers)
    for name in COUNT_NAMES:
        if section.get(name) == layers:
            section[name] = len(kept)
    return _rebuilt(config, values)


def skeleton(network: Any, config: Any) -> Any:
    """A network of the same class on the meta device: modules and shapes without numbers.

    Raises:
        PrunelensError: the family does not accept the configuration.
    """
    try:
        with torch.device("meta"):
            return type(network)(config).eval()
    except Exception as error:  # families check their settings with errors of any kind
        raise _inexpressible(config, " ".join(str(error).split())[:200]) from error


def check_blocks(before: Sequence[nn.Module], after: Sequence[nn.Module], kept: Sequence[int], config: Any) -> None:
    """Refuse a configuration under which a block that stays would be another one.

    Args:
        before: all blocks.
        after: the blocks of the network without the others.
        kept: for each of `after`, its index in `before`.
        config: the new configuration, for the message.

    Raises:
        PrunelensError: as said; the block and the setting are named.
    """
    if len(after) != len(kept):
        raise _inexpressible(config, f"{len(after)} layers would be made of {len(kept)}")
    for old in kept:
        fault = _difference(before[old], after[kept.index(old)])
        if fault:
            raise _inexpressible(config, f"in layer {old} {fault}, which follows from its place among the layers")


def check_cache(before: Any, after: Any) -> None:
    """Refuse to cut the last attention out of a family that counts the tokens it has read there.

    Args:
        before: the configuration of all layers.
        after: that of the layers that stay.

    Raises:
        PrunelensError: as said.
    """
    if _num_counting(before) and not _num_counting(after):
        raise _inexpressible(after, "none of its attention layers would stay, and cached generation needs one")


def _num_counting(config: Any) -> int:
    """How many layers keep keys and values; the states of the others count no tokens."""
    return sum(isinstance(layer, CacheLayerMixin) for layer in DynamicCache(config=config).layers)


def _inexpressible(config: Any, why: str) -> PrunelensError:
    return PrunelensError(
        f"a {config.model_type} model without these layers cannot be written as a checkpoint of its family: {why}; "
        "drop other blocks, or their attention and MLP instead of whole blocks"
    )


def _values(config: Any) -> dict[str, Any]:
    """What config.json would hold."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def _rebuilt(config: Any, values: dict[str, Any]) -> Any:
    try:
        made = type(config).from_dict(values)
    except Exception as error:  # families check their settings with errors of any kind
        raise _inexpressible(config, " ".join(str(error).split())[:200]) from error
    made._attn_implementation = config._attn_implementation
    return made


def _decoder_section(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The settings of the part that writes text among `values`, which are those of `config`."""
    section = _section_of(config, config.get_text_config(decoder=True), values)
    if section is None:
        raise _inexpressible(config, "its settings do not tell those of the part that writes text apart")
    return section


def _section_of(config: Any, wanted: Any, values: dict[str, Any]) -> dict[str, Any] | None:
    if config is wanted:
        return values
    parts = ((name, getattr(config, name, None)) for name in config.sub_configs)
    found = (_section_of(part, wanted, values[name]) for name, part in parts if part is not None)
    return next((section for section in found if section is not None), None)


def _say_dense_layers(section: dict[str, Any], layers: int) -> None:
    """Write dense layers that follow from a step as a list, which can be renumbered."""
    step = section.get("decoder_sparse_step")
    if isinstance(step, int) and step > 1 and isinstance(section.get("mlp_only_layers"), list):
        by_step = [layer for layer in range(layers) if (layer + 1) % step]
        section["mlp_only_layers"] = sorted({*section["mlp_only_layers"], *by_step})
        section["decoder_sparse_step"] = 1


def _new_period(section: dict[str, Any], period: str, offset: str, kept: Sequence[int]) -> tuple[int, int]:
    """A period and an offset under which the layers that stay keep their types; those there are if none fit."""
    wanted = [old % section[period] == section[offset] for old in kept]
    candidates = [(section[period], shift) for shift in range(section[period])]
    candidates += [(length, shift) for length in range(1, len(kept) + 2) for shift in range(length)]
    for length, shift in candidates:
        if [layer % length == shift for layer in range(len(kept))] == wanted:
            return length, shift
    return section[period], section[offset]


def _renumber(section: dict[str, Any], kept: Sequence[int], layers: int) -> None:
    for name, value in section.items():
        if isinstance(value, dict):
            _renumber(value, kept, layers)
        elif name in INDEX_LISTS and isinstance(value, list):
            section[name] = [new for new, old in enumerate(kept) if old in value]
        elif name in LEADING_COUNTS and isinstance(value, int):
            section[name] = sum(old < value for old in kept)
        elif _is_per_layer(name, value, layers):
            section[name] = [value[old] for old in kept]


def _is_per_layer(name: str, value: Any, layers: int) -> bool:
    if not isinstance(value, list | tuple) or len(value) != layers or name.startswith("mtp"):
        return False
    return name in LAYER_LISTS or any(word in name for word in LAYER_WORDS)


def _difference(old: nn.Module, new: nn.Module) -> str | None:
    """What sets two modules apart other than their numbers and their place, in words."""
    before, after = dict(old.named_modules()), dict(new.named_modules())
    if [(name, type(part)) for name, part in before.items()] != [(name, type(part)) for name, part in after.items()]:
        return "other parts would be used"
    for name, part in before.items():
        where = f"{name} would" if name else "the layer would"
        if _shapes(part) != _shapes(after[name]):
            return f"{where} have weights of another shape"
        mine, theirs = _settings(part), _settings(after[name])
        changed = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if changed:
            key = changed[0]
            return f"{where} have {key} {theirs.get(key)} instead of {mine.get(key)}"
    return None


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: tuple(tensor.shape) for name, tensor in named}


def _settings(module: nn.Module) -> dict[str, Plain]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in PLACES and not name.startswith("_") and (value is None or isinstance(value, int | float | str))
    }
