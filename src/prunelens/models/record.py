"""What a checkpoint's config.json says of its sublayers with zeroed weights, so that they can be removed on loading."""

from typing import Any

from prunelens.errors import PrunelensError
from prunelens.models.surgery import NOTHING, Drop

KEY = "prunelens"
KINDS = ("attention", "mlp")


def record_of(drop: Drop, recipe: str) -> dict[str, Any]:
    """The entry `prunelens` of a config.json; layers are counted as in that checkpoint."""
    return {"dropped": {kind: sorted(getattr(drop, kind)) for kind in KINDS}, "recipe": recipe}


def recorded_drop(config: Any) -> Drop:
    """The sublayers that a configuration says are zeroed; none where it has no such record.

    Args:
        config: a transformers configuration.

    Raises:
        PrunelensError: the record is not one that this program writes.
    """
    record = getattr(config, KEY, None)
    if record is None:
        return NOTHING
    layers = config.get_text_config(decoder=True).num_hidden_layers
    dropped = record.get("dropped") if isinstance(record, dict) else None
    if not isinstance(dropped, dict) or set(dropped) != set(KINDS):
        raise _strange("lists of layers under dropped.attention and dropped.mlp", dropped)
    for kind in KINDS:
        indices = dropped[kind]
        if not isinstance(indices, list) or len(indices) > layers:
            raise _strange(f"at most {layers} layers under dropped.{kind}", indices)
        if not all(type(index) is int and 0 <= index < layers for index in indices):
            raise _strange(f"layers from 0 to {layers - 1} under dropped.{kind}", indices)
        if len(set(indices)) != len(indices):
            raise _strange(f"each layer once under dropped.{kind}", indices)
    return Drop(frozenset(dropped["attention"]), frozenset(dropped["mlp"]))


def _strange(expected: str, found: Any) -> PrunelensError:
    shown = repr(found)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    return PrunelensError(
        f"expected {expected} in the entry {KEY!r} of config.json, found {shown}; remove the entry, or download the "
        "checkpoint again"
    )
