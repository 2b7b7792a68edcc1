"""What a checkpoint's config.json says of its sublayers with zeroed weights, so that they can be removed on loading."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prunelens.errors import PrunelensError
from prunelens.models.anatomy.find import Anatomy
from prunelens.models.anatomy.hooks import decoder_of, run_decoder
from prunelens.models.anatomy.probe import probe_ids
from prunelens.models.anatomy.proofs import is_close
from prunelens.models.opening.repair_files import KEY, read_repairs, unexpected
from prunelens.models.surgery.drop import NOTHING, Drop, attach, dropped, remove
from prunelens.models.surgery.repairs import STREAM, Repair

KINDS = ("attention", "mlp")


def record_of(
    drop: Drop, recipe: str, methods: Sequence[dict[str, Any]] = (), repairs: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The entry `prunelens` of a config.json; layers are counted as in that checkpoint.

    Args:
        drop: sublayers whose weights are zeros.
        recipe: how the checkpoint was made; nobody parses it again.
        methods: records of the methods from outside that made it.
        repairs: entries of the repairs.
    """
    found: dict[str, Any] = {"dropped": {kind: sorted(getattr(drop, kind)) for kind in KINDS}, "recipe": recipe}
    return found | ({"methods": list(methods)} if methods else {}) | ({"repairs": list(repairs)} if repairs else {})


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
        raise unexpected("lists of layers under dropped.attention and dropped.mlp", dropped)
    for kind in KINDS:
        indices = dropped[kind]
        if not isinstance(indices, list) or len(indices) > layers:
            raise unexpected(f"at most {layers} layers under dropped.{kind}", indices)
        if not all(type(index) is int and 0 <= index < layers for index in indices):
            raise unexpected(f"layers from 0 to {layers - 1} under dropped.{kind}", indices)
        if len(set(indices)) != len(indices):
            raise unexpected(f"each layer once under dropped.{kind}", indices)
    return Drop(frozenset(dropped["attention"]), frozenset(dropped["mlp"]))


def remove_recorded(network: Any, anatomy: Anatomy, name: str, folder: Path | None = None) -> list[str]:
    """Take out the sublayers that a checkpoint carries as zeros, if its record of them is true, and put repairs in.

    Args:
        network: the opened network, which loses their modules' work and weights.
        anatomy: where its parts are.
        name: what the user called it.
        folder: the checkpoint, which may hold a file of repairs.

    Returns:
        Remarks on the repairs.

    Raises:
        PrunelensError: the record is not one that this program writes, or the weights are not zero.
    """
    drop = recorded_drop(network.config)
    repairs = read_repairs(network, anatomy.hidden_size, folder)
    there = {(part.kind, part.layer_idx) for block in anatomy.blocks for part in block.sublayers}
    absent = sorted({(kind, layer_idx) for kind in KINDS for layer_idx in getattr(drop, kind)} - there)
    if absent:
        raise unexpected("layers that have the part under dropped", absent)
    for repair, _ in repairs:
        if repair.kind != STREAM and repair.layer_idx not in getattr(drop, repair.kind):
            raise unexpected("repairs of sublayers that are dropped", f"{repair.kind} {repair.layer_idx}")
    inside = [
        (_in_stream_units(repair, anatomy) if carried else repair, carried)
        for repair, carried in repairs
        if repair.kind != STREAM
    ]
    if drop != NOTHING:
        _check_zeros(network, anatomy, drop, [repair for repair, carried in inside if carried], name)
        remove(anatomy, drop, [repair for repair, _ in inside])
    own = [repair for repair, carried in repairs if repair.kind == STREAM and not carried]
    for repair in own:
        attach(anatomy, repair)
    count = len(own) + sum(not carried for _, carried in inside)
    return [f"{name} carries {count} repairs of its own, which other programs leave out"] if count else []


def _in_stream_units(repair: Repair, anatomy: Anatomy) -> Repair:
    """A bias that a parameter carries, times what the block multiplies it by."""
    part = next(part for part in anatomy.blocks[repair.layer_idx].sublayers if part.kind == repair.kind)
    return Repair(repair.kind, repair.layer_idx, repair.bias * part.scale)


def _check_zeros(network: Any, anatomy: Anatomy, drop: Drop, carried: Sequence[Repair], name: str) -> None:
    decoder, ids = decoder_of(network), probe_ids(network)
    with torch.inference_mode():
        whole = run_decoder(decoder, ids)
        with dropped(anatomy, drop, carried):
            without = run_decoder(decoder, ids)
    if not is_close(without, whole):
        raise PrunelensError(
            f"{name}: its config.json says that sublayers are zeroed (entry {KEY!r}), but their weights do "
            "something; remove the entry, or download the checkpoint again"
        )
