"""Mixtures of experts: find them by structure.

A mixture is an experts module, whose parameters all have the experts first and two of which at least are 3-D, and a
router, which hands it the experts of each token and their weights. Both are found in one short pass: the router is
the module that returned exactly what the experts were given.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunelens.errors import PrunelensError
from prunelens.models.anatomy.hooks import Call, decoder_of, run_decoder
from prunelens.models.anatomy.parts import Block
from prunelens.models.anatomy.probe import probe_ids
from prunelens.models.model import Model

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of experts of a mixture."""
GROUP_BEST = 2
"""A router with groups judges a group by its two best experts."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """The mixture of experts of block `layer_idx`.

    Attributes:
        layer_idx: index of its block.
        holder: the module that calls both the router and the experts.
        experts: called with hidden states (tokens, d), experts (tokens, top_k) and their weights (tokens, top_k).
        router: returns a tuple with the experts and the weights of each token among its items.
        num_experts: experts to choose from.
        top_k: experts each token is sent to.
        num_groups: groups of neighbouring experts, of equal size, of which the router first chooses some; else 1.
        min_kept: fewest experts with which the router still works.
        index_at: where in the router's output the chosen experts are.
        rows_at: where in the router's output there is one value for each expert.
    """

    layer_idx: int
    holder: nn.Module
    experts: nn.Module
    router: nn.Module
    num_experts: int
    top_k: int
    num_groups: int
    min_kept: int
    index_at: int
    rows_at: tuple[int, ...]

    def kept(self, dropped: Collection[int]) -> list[int]:
        """The experts that are left, in order."""
        return [expert for expert in range(self.num_experts) if expert not in dropped]

    def tensors(self) -> Iterator[tuple[nn.Module, str, int]]:
        """Every parameter and buffer with one entry for each expert: owner, name there, and the experts' axis."""
        for module in dict.fromkeys([self.holder, *self.experts.modules(), *self.router.modules()]):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and self.num_experts in tensor.shape:
                    yield module, name, tensor.shape.index(self.num_experts)


@dataclass(frozen=True)
class Routed:
    """What an experts module was called with: states (tokens, d), experts and weights (tokens, top_k)."""

    states: Tensor
    index: Tensor
    weights: Tensor


def routed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routed | None:
    """The call of an experts module, read by structure; None if it is called with anything else."""
    tensors = list(Call(args, kwargs, None).arguments.values())
    if len(tensors) != 3 or not all(isinstance(tensor, Tensor) and tensor.ndim == 2 for tensor in tensors):
        return None
    indices = [tensor for tensor in tensors if not tensor.is_floating_point()]
    if len(indices) != 1 or tensors[0] is indices[0]:
        return None
    weights = next(tensor for tensor in tensors[1:] if tensor is not indices[0])
    fits = weights.shape == indices[0].shape and len(tensors[0]) == len(weights)
    return Routed(tensors[0], indices[0], weights) if fits else None


def find_mixtures(model: Model) -> dict[int, Mixture]:
    """The mixture of experts of every block that has one, by layer_idx; one short pass of the model.

    Raises:
        PrunelensError: no block has one, or one is built so that its experts cannot be taken out; the family and
            the reason are named.
    """
    candidates = {block.layer_idx: _experts_modules(block) for block in model.anatomy.blocks}
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[module] = Call(args, kwargs, output)

    watched = {part for block in model.anatomy.blocks if candidates[block.layer_idx] for part in block.module.modules()}
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in watched]
    try:
        with torch.inference_mode():
            if watched:
                run_decoder(decoder_of(model.network), probe_ids(model.network))
    finally:
        for handle in handles:
            handle.remove()
    found = {
        block.layer_idx: _mixture(model, block, candidates[block.layer_idx], calls)
        for block in model.anatomy.blocks
        if candidates[block.layer_idx]
    }
    if not found:
        if any(getattr(model.network.config.get_text_config(), name, None) for name in COUNTS):
            raise refused(model, "its experts are not stacked in 3-D parameters")
        raise PrunelensError(f"expected a mixture of experts, found none in {family_of(model)}; drop other parts of it")
    return found


def check_kept(mixture: Mixture, kept: Collection[int]) -> None:
    """Refuse what a router cannot choose from: too few experts, or groups of different size.

    Raises:
        PrunelensError: it is so.
    """
    size = mixture.num_experts // mixture.num_groups
    sizes = {sum(expert // size == group for expert in kept) for group in range(mixture.num_groups)}
    if len(sizes) > 1:
        raise PrunelensError(
            f"expected equally many experts left in each of the {mixture.num_groups} groups of layer "
            f"{mixture.layer_idx}, found from {min(sizes)} to {max(sizes)}; drop the same number in each group"
        )
    if len(kept) < mixture.min_kept:
        groups = f" in {mixture.num_groups} groups" if mixture.num_groups > 1 else ""
        raise PrunelensError(
            f"expected at least {mixture.min_kept} experts left in layer {mixture.layer_idx}, whose router chooses "
            f"{mixture.top_k} for each token{groups}, found {len(kept)}; drop fewer"
        )


def family_of(model: Model) -> str:
    """What messages call a model: its name and its family."""
    return f"{model.name} (family {model.network.config.model_type})"


def refused(model: Model, reason: str) -> PrunelensError:
    """The error that experts of this model cannot be taken out, and why."""
    return PrunelensError(
        f"experts of {family_of(model)} cannot be taken out: {reason}; drop other parts, or use a model of another "
        "family"
    )


def _experts_modules(block: Block) -> list[nn.Module]:
    """Modules that hold at least two 3-D parameters, and no parameter that does not have the experts first."""
    found = []
    for module in block.module.modules():
        weights = [weight for weight in module._parameters.values() if weight is not None]
        stacked = [weight for weight in weights if weight.ndim == 3]
        if len(stacked) >= 2 and len({weight.shape[0] for weight in weights}) == 1:
            found.append(module)
    return found


def _mixture(model: Model, block: Block, candidates: list[nn.Module], calls: Mapping[nn.Module, Call]) -> Mixture:
    if len(candidates) > 1:
        raise refused(model, f"{block.name} has {len(candidates)} mixtures")
    experts = candidates[0]
    num_experts = next(experts.parameters()).shape[0]
    given = routed(calls[experts].args, calls[experts].kwargs) if experts in calls else None
    if given is None:
        raise refused(model, f"the experts of {block.name} are not called with states, chosen experts and weights")
    routers = [
        module
        for module in block.module.modules()
        if module in calls and _has_rows(module, num_experts) and _hands_out(calls[module].output, given)
    ]
    if len(routers) != 1:
        raise refused(model, f"no module of {block.name} returns the chosen experts and the weights they get")
    holder = next(module for module in block.module.modules() if experts in set(module.children()))
    output = calls[routers[0]].output
    top_k = given.index.shape[-1]
    num_groups, min_kept = _groups(model.network.config.get_text_config(), top_k)
    return Mixture(
        layer_idx=block.layer_idx,
        holder=holder,
        experts=experts,
        router=routers[0],
        num_experts=num_experts,
        top_k=top_k,
        num_groups=num_groups,
        min_kept=min_kept,
        index_at=next(place for place, item in enumerate(output) if _equal(item, given.index)),
        rows_at=tuple(place for place, item in enumerate(output) if _ends_in(item, num_experts)),
    )


def _has_rows(module: nn.Module, num_experts: int) -> bool:
    weights = module._parameters.values()
    return any(weight is not None and weight.ndim == 2 and weight.shape[0] == num_experts for weight in weights)


def _hands_out(output: Any, given: Routed) -> bool:
    items = output if isinstance(output, tuple) else ()
    return all(any(_equal(item, wanted) for item in items) for wanted in (given.index, given.weights))


def _equal(item: Any, wanted: Tensor) -> bool:
    """Whether these are the wanted numbers; the holder may have brought weights to another precision."""
    if not isinstance(item, Tensor) or item.is_floating_point() != wanted.is_floating_point():
        return False
    return torch.equal(item.to(wanted.dtype), wanted)


def _ends_in(item: Any, num_experts: int) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point() and item.shape[-1] == num_experts


def _groups(config: Any, top_k: int) -> tuple[int, int]:
    """(number of groups, fewest experts that can be left) of a router."""
    num_groups = getattr(config, "n_group", None)
    if num_groups is None:
        return 1, top_k
    chosen = getattr(config, "topk_group", None) or num_groups
    return num_groups, num_groups * max(GROUP_BEST, -(-top_k // chosen))
