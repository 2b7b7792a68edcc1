"""Where a checkpoint can carry a repair: its place among the layers that stay, and a bias that is there anyway."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prunelens.models.anatomy.parts import Sublayer
from prunelens.models.anatomy.proofs import is_close
from prunelens.models.model import Model
from prunelens.models.saving.zeroing import added, silencing_weights
from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.repairs import STREAM, Repair
from prunelens.models.surgery.shared_copy import named_owners, set_weight, shared_copy_of

BiasParameters = Mapping[int, tuple[str, Tensor]]
"""By index among repairs: the name of a parameter, and the value with which it carries that repair."""


def renumbered(repairs: Sequence[Repair], kept: Sequence[int]) -> list[Repair]:
    """The repairs at their places in a checkpoint without the other blocks.

    Args:
        repairs: in the layers of the whole model.
        kept: the layers that stay.
    """
    found = []
    for repair in repairs:
        before = sum(layer_idx < repair.layer_idx for layer_idx in kept)
        found.append(repair.at(STREAM if repair.kind == "block" else repair.kind, before))
    return found


def bias_parameters(model: Model, drop: Drop, repairs: Sequence[Repair]) -> BiasParameters:
    """For each repair that is a bias, the parameter of the model that can carry it, and its new value.

    A sublayer's own output bias serves, its matrices being zero, or that of the last sublayer before cut blocks.

    Args:
        model: the model with all parts.
        drop: what is out.
        repairs: what stands in for it.

    Returns:
        By index among `repairs`; those for which no parameter is there are left out.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for index, repair in enumerate(repairs):
        carrier = _carrier(model, drop, repair) if repair.down is None else None
        name = _output_bias(model, carrier) if carrier is not None else None
        if name is not None and carrier is not None:
            own = model.network.get_parameter(name)
            start = own if repair.kind == "block" else torch.zeros_like(own)
            found[index] = (name, start + (repair.bias / carrier.scale).to(own.dtype))
    return found


def _carrier(model: Model, drop: Drop, repair: Repair) -> Sublayer | None:
    """The sublayer whose output bias could carry the repair."""
    if repair.kind != "block":
        parts = model.anatomy.blocks[repair.layer_idx].sublayers
        return next(part for part in parts if part.kind == repair.kind)
    if repair.layer_idx == 0:
        return None
    part = model.anatomy.blocks[repair.layer_idx - 1].sublayers[-1]
    return None if part.layer_idx in drop.block | getattr(drop, part.kind) else part


def _output_bias(model: Model, part: Sublayer) -> str | None:
    """The name of a parameter that adds to what a sublayer adds at every token; proved by changing it.

    Not by the repair's bias, which may be so small that rounding hides what becomes of it.
    """
    names = silencing_weights(model, Drop(**{part.kind: frozenset([part.layer_idx])}))
    size = model.anatomy.hidden_size
    before = added(model, part).double()
    tried = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(before.device)
    tried *= before.square().mean().sqrt() or 1.0
    for name in sorted(names):
        if not name.endswith("bias") or model.network.get_parameter(name).shape != (size,):
            continue
        twin = shared_copy_of(model)
        module, attribute = named_owners(twin.network)[name]
        own = module.get_parameter(attribute)
        set_weight(module, attribute, own + (tried / part.scale).to(own))
        same = next(one for one in twin.anatomy.blocks[part.layer_idx].sublayers if one.kind == part.kind)
        if is_close((added(twin, same).double() - before).to(model.dtype), tried.expand_as(before)):
            return name
    return None
