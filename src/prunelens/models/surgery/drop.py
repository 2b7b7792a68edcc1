"""Take sublayers or blocks out of a loaded model and put them back, without a second copy of its weights.

A dropped sublayer returns zeros (or the stream, where it adds that inside) and a dropped block its input, which
equals zeroed output projections; where it is repaired, what its map makes of its input is added. They still tell
the KV cache that the tokens passed: many families read the length of the past from the first layer's cache, so a
silent layer 0 would break cached decoding.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from prunelens.models.anatomy.find import Anatomy
from prunelens.models.anatomy.hooks import Call, input_tensor, replaced_forward
from prunelens.models.anatomy.parts import Block, Link, Sublayer
from prunelens.models.placement import counted_parameters
from prunelens.models.surgery.repairs import NAME, BlockRepair, Repair, RepairSite, find_repair


@dataclass(frozen=True)
class Drop:
    """Which parts are taken out: indices of layers whose attention, MLP or whole block goes."""

    attention: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()
    block: frozenset[int] = frozenset()

    @property
    def first_layer(self) -> int | None:
        """The first layer that changes; None if nothing is dropped."""
        return min(self.attention | self.mlp | self.block, default=None)

    def __or__(self, other: "Drop") -> "Drop":
        return Drop(self.attention | other.attention, self.mlp | other.mlp, self.block | other.block)


NOTHING = Drop()


@contextmanager
def dropped(anatomy: Anatomy, drop: Drop, repairs: Sequence[Repair] = ()) -> Iterator[None]:
    """Run the body with these sublayers and blocks taken out of the model, and repairs in their places."""
    with replaced_forward(_forwards_without(anatomy, drop, repairs)):
        yield


def remove(anatomy: Anatomy, drop: Drop, repairs: Sequence[Repair] = ()) -> None:
    """Take these sublayers and blocks out for good, let their weights go, and let repairs be part of the network.

    A block stays as a shell whose sublayers do nothing, so that one of them can be put back by `swapped`.
    """
    for module, forward in _forwards_without(anatomy, drop, repairs).items():
        _let_go(module)
        if module not in (block.module for block in anatomy.blocks):
            module.forward = forward
    for layer_idx in drop.block:
        block = anatomy.blocks[layer_idx]
        repair = find_repair(repairs, "block", layer_idx)
        if repair is not None:
            block.module.forward = BlockRepair(repair, block.module.forward, before=False).run
        for part in block.sublayers:
            for strand in part.strands:
                for link in strand.links:
                    silent = link.module in (strand.module, *strand.body)
                    link.module.forward = _nothing(link, strand, part) if silent else _unchanged(link)
    for repair in repairs:
        _place(anatomy.blocks[repair.layer_idx], repair).add_module(NAME, repair)


def attach(anatomy: Anatomy, repair: Repair) -> None:
    """Let a repair of kind `STREAM` be part of the network: after the block before it, or before the first."""
    before = repair.layer_idx == 0
    block = anatomy.blocks[0 if before else repair.layer_idx - 1].module
    block.forward = BlockRepair(repair, block.forward, before).run
    block.add_module(f"{NAME}_before" if before else NAME, repair)


def _let_go(module: nn.Module) -> None:
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = _empty_like(weight)


def _place(block: Block, repair: Repair) -> nn.Module:
    """The module that a repair stands in for."""
    part = next((part for part in block.sublayers if part.kind == repair.kind), None)
    return block.module if part is None else part.body[0]


def _empty_like(weight: torch.Tensor) -> nn.Parameter:
    """Nothing, in the dtype of a weight (quantised ones know no `new_empty`)."""
    return nn.Parameter(torch.empty(0, dtype=weight.dtype, device=weight.device), requires_grad=False)


def _forwards_without(
    anatomy: Anatomy, drop: Drop, repairs: Sequence[Repair] = ()
) -> dict[nn.Module, Callable[..., Any]]:
    """What to call instead of the modules that are taken out."""
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for block in anatomy.blocks:
        if block.layer_idx in drop.block:
            repair = find_repair(repairs, "block", block.layer_idx)
            silent = _identity(block)
            forwards[block.module] = silent if repair is None else BlockRepair(repair, silent, before=False).run
            continue
        for part in block.sublayers:
            if block.layer_idx in getattr(drop, part.kind):
                repair = find_repair(repairs, part.kind, block.layer_idx)
                forwards |= _silent(block, part) if repair is None else _seated(block, part, repair)
    return forwards


@contextmanager
def swapped(anatomy: Anatomy, other: Anatomy, parts: Collection[tuple[str, int]]) -> Iterator[None]:
    """Run the body with these sublayers, (kind, layer_idx), computed by another model of the same shape.

    A norm that two sublayers share belongs to neither and stays.
    """
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for kind, layer_idx in parts:
        own, theirs = (own_modules(found.blocks[layer_idx], kind) for found in (anatomy, other))
        forwards |= {module: twin.forward for module, twin in zip(own, theirs, strict=True)}
    with replaced_forward(forwards):
        yield


def own_modules(block: Block, kind: str) -> list[nn.Module]:
    """The modules that serve only the block's sublayer of this kind."""
    others = {module for part in block.sublayers if part.kind != kind for module in part.modules}
    return [module for part in block.sublayers if part.kind == kind for module in part.modules if module not in others]


def num_parameters(model: nn.Module, anatomy: Anatomy, drop: Drop = NOTHING, repairs: Sequence[Repair] = ()) -> int:
    """Parameters that the model reads when these parts are out (a sublayer goes with its own norms)."""
    return sum(_numbers(weight) for weight in kept_weights(model, anatomy, drop, repairs))


def kept_weights(
    model: nn.Module, anatomy: Anatomy, drop: Drop = NOTHING, repairs: Sequence[Repair] = ()
) -> Iterator[nn.Parameter]:
    """The parameters that the model reads when these parts are out, each once, those of repairs last."""
    gone = {part for module in _forwards_without(anatomy, drop, repairs) for part in module.modules()}
    read = {id(weight) for module in model.modules() if module not in gone for weight in module._parameters.values()}
    yield from (weight for _, weight in counted_parameters(model) if id(weight) in read)
    yield from (weight for repair in repairs for weight in repair.parameters())


def _numbers(weight: torch.Tensor) -> int:
    """How many numbers a weight stands for; bitsandbytes packs two into a byte."""
    shape = getattr(getattr(weight, "quant_state", None), "shape", None)
    return weight.numel() if shape is None else math.prod(shape)


def _silent(block: Block, part: Sublayer) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards that take a sublayer out: its `module` adds nothing, and nothing else of its own is computed."""
    own = own_modules(block, part.kind)
    return {
        link.module: _nothing(link, strand, part) if link.module in (strand.module, *strand.body) else _unchanged(link)
        for strand in part.strands
        for link in strand.links
        if link.module is strand.module or link.module in own
    }


def _seated(block: Block, part: Sublayer, repair: Repair) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards that put a repair in the place of a sublayer; what it reads is normed as before."""
    links = part.links[part.chain.index(part.body[0]) :]
    first, last = links[0].module, links[-1].module
    seat = RepairSite(repair, _nothing(links[0], part, part), part.residual_at, part.scale, links[-1].returned)
    forwards = {
        link.module: _nothing(link, strand, part) if link.module in part.body else _unchanged(link)
        for strand in part.strands
        for link in (links if strand is part else strand.links[strand.chain.index(strand.body[0]) :])
    }
    own = own_modules(block, part.kind)
    forwards = {module: forward for module, forward in forwards.items() if module in own}
    if first is last:
        return forwards | {first: seat.whole}
    return forwards | {first: seat.begin, last: seat.end}


def _unchanged(link: Link) -> Callable[..., Any]:
    """What stands for a norm or an activation of a sublayer that is out."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return link.returned.around(input_tensor(args, kwargs), args, kwargs)

    return forward


def _nothing(link: Link, part: Sublayer, whole: Sublayer) -> Callable[..., Any]:
    """What stands for a module of one chain of a whole sublayer; its first chain alone tells the cache."""
    layer_idx = getattr(link.module, "layer_idx", part.layer_idx)

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden_states = input_tensor(args, kwargs)
        assert hidden_states is not None
        if part.kind == "attention" and part is whole:
            _tell_cache(hidden_states, args, kwargs, layer_idx)
        if part.adds_residual and link.module is part.module:
            return link.returned.around(Call(args, kwargs, None).arguments[part.residual_at], args, kwargs)
        zeros = hidden_states.new_zeros(*hidden_states.shape[:-1], link.width)
        return link.returned.around(zeros, args, kwargs)

    return forward


def _identity(block: Block) -> Callable[..., Any]:
    attention = block.find("attention")
    bodies = attention.body if attention is not None else ()
    layer_idx: Any = next((module.layer_idx for module in bodies if hasattr(module, "layer_idx")), block.layer_idx)

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden_states = input_tensor(args, kwargs)
        assert hidden_states is not None
        if attention is not None:
            _tell_cache(hidden_states, args, kwargs, layer_idx)
        return block.returned.around(hidden_states, args, kwargs)

    return forward


def _tell_cache(hidden_states: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], layer_idx: int) -> None:
    """Let as many empty keys into the layer's cache as there are tokens; a recurrent state counts none."""
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    if cache is None:
        return
    if layer_idx >= len(cache.layers) or isinstance(cache.layers[layer_idx], CacheLayerMixin):
        batch, length = hidden_states.shape[:2]
        nothing = hidden_states.new_zeros(batch, 1, length, 1)
        cache.update(nothing, nothing, layer_idx)
