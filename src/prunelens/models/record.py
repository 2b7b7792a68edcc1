"""What a checkpoint's config.json says of its sublayers with zeroed weights, so that they can be removed on loading."""

from typing import Any

import torch

from prunelens.errors import PrunelensError
from prunelens.models.anatomy import Anatomy
from prunelens.models.probe import probe_ids
from prunelens.models.proofs import is_close
from prunelens.models.surgery import NOTHING, Drop, dropped, remove
from prunelens.models.taps import decoder_of, run_decoder

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


def remove_recorded(network: Any, anatomy: Anatomy, name: str) -> None:
    """Take out the sublayers that a checkpoint carries as zeros, if its record of them is true.

    Args:
        network: the opened network, which loses their modules' work and weights.
        anatomy: where its parts are.
        name: what the user called it.

    Raises:
        PrunelensError: the record is not one that this program writes, or the weights are not zero.
    """
    drop = recorded_drop(network.config)
    if drop == NOTHING:
        return
    decoder, ids = decoder_of(network), probe_ids(network)
    with torch.inference_mode():
        whole = run_decoder(decoder, ids)
        with dropped(anatomy, drop):
            without = run_decoder(decoder, ids)
    if not is_close(without, whole):
        raise PrunelensError(
            f"{name}: its config.json says that sublayers are zeroed (entry {KEY!r}), but their weights do "
            "something; remove the entry, or download the checkpoint again"
        )
    remove(anatomy, drop)


def _strange(expected: str, found: Any) -> PrunelensError:
    shown = repr(found)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
    return PrunelensError(
        f"expected {expected} in the entry {KEY!r} of config.json, found {shown}; remove the entry, or download the "
        "checkpoint again"
    )
