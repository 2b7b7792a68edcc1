"""Take sublayers or blocks out of a loaded model and put them back, without a second copy of its weights.

A dropped sublayer returns zeros (or the stream, where it adds that inside) and a dropped block its input, which
equals zeroed output projections. They still tell the KV cache that the tokens passed: many families read the
length of the past from the first layer's cache, so a silent layer 0 would break cached decoding.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from prunelens.models.anatomy import Anatomy, Block, Link, Sublayer
from prunelens.models.placement import counted_parameters
from prunelens.models.taps import Call, input_tensor, replaced_forward


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
def dropped(anatomy: Anatomy, drop: Drop) -> Iterator[None]:
    """Run the body with these sublayers and blocks taken out of the model."""
    with replaced_forward(_forwards_without(anatomy, drop)):
        yield


def remove(anatomy: Anatomy, drop: Drop) -> None:
    """Take these sublayers and blocks out for good, and let their weights go."""
    for module, forward in _forwards_without(anatomy, drop).items():
        module.forward = forward
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is not None:
                    part._parameters[name] = _empty_like(weight)


def _empty_like(weight: torch.Tensor) -> nn.Parameter:
    """Nothing, in the dtype of a weight (quantised ones know no `new_empty`)."""
    return nn.Parameter(torch.empty(0, dtype=weight.dtype, device=weight.device), requires_grad=False)


def _forwards_without(anatomy: Anatomy, drop: Drop) -> dict[nn.Module, Callable[..., Any]]:
    """What to call instead of the modules that are taken out."""
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for block in anatomy.blocks:
        if block.layer_idx in drop.block:
            forwards[block.module] = _identity(block)
            continue
        for part in block.sublayers:
            if block.layer_idx in getattr(drop, part.kind):
                forwards |= _silent(block, part)
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
    others = {module for part in block.sublayers if part.kind != kind for module in part.chain}
    return [module for part in block.sublayers if part.kind == kind for module in part.chain if module not in others]


def num_parameters(model: nn.Module, anatomy: Anatomy, drop: Drop = NOTHING) -> int:
    """Parameters that the model reads when these parts are out (a sublayer goes with its own norms)."""
    return sum(_numbers(weight) for weight in kept_weights(model, anatomy, drop))


def kept_weights(model: nn.Module, anatomy: Anatomy, drop: Drop = NOTHING) -> Iterator[nn.Parameter]:
    """The parameters that the model reads when these parts are out, each once."""
    gone: set[int] = set()
    for block in anatomy.blocks:
        if block.layer_idx in drop.block:
            gone.update(id(weight) for weight in block.module.parameters())
        for part in block.sublayers:
            if block.layer_idx in getattr(drop, part.kind):
                modules = own_modules(block, part.kind)
                gone.update(id(weight) for module in modules for weight in module.parameters())
    yield from (weight for _, weight in counted_parameters(model) if id(weight) not in gone)


def _numbers(weight: torch.Tensor) -> int:
    """How many numbers a weight stands for; bitsandbytes packs two into a byte."""
    shape = getattr(getattr(weight, "quant_state", None), "shape", None)
    return weight.numel() if shape is None else math.prod(shape)


def _silent(block: Block, part: Sublayer) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards that take a sublayer out: its `module` adds nothing, and nothing else of its own is computed."""
    own = own_modules(block, part.kind)
    return {
        link.module: _nothing(link, part) if link.module in (part.module, *part.body) else _unchanged(link)
        for link in part.links
        if link.module is part.module or link.module in own
    }


def _unchanged(link: Link) -> Callable[..., Any]:
    """What stands for a norm or an activation of a sublayer that is out."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _as_returned(input_tensor(args, kwargs), link.num_outputs)

    return forward


def _nothing(link: Link, part: Sublayer) -> Callable[..., Any]:
    layer_idx = getattr(link.module, "layer_idx", part.layer_idx)

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden_states = input_tensor(args, kwargs)
        assert hidden_states is not None
        if part.kind == "attention":
            _tell_cache(hidden_states, args, kwargs, layer_idx)
        if part.adds_residual and link.module is part.module:
            return _as_returned(Call(args, kwargs, None).arguments[part.residual_at], link.num_outputs)
        zeros = hidden_states.new_zeros(*hidden_states.shape[:-1], link.width)
        return _as_returned(zeros, link.num_outputs)

    return forward


def _as_returned(tensor: torch.Tensor | None, num_outputs: int) -> Any:
    return (tensor, *[None] * (num_outputs - 1)) if num_outputs else tensor


def _identity(block: Block) -> Callable[..., Any]:
    attention = block.find("attention")
    bodies = attention.body if attention is not None else ()
    layer_idx: Any = next((module.layer_idx for module in bodies if hasattr(module, "layer_idx")), block.layer_idx)

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden_states = input_tensor(args, kwargs)
        assert hidden_states is not None
        if attention is not None:
            _tell_cache(hidden_states, args, kwargs, layer_idx)
        return _as_returned(hidden_states, block.num_outputs)

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
