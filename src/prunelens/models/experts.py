"""Mixtures of experts: find them by structure, take experts out of the choice, and slice them away for good.

A mixture is an experts module, whose parameters all have the experts first and two of which at least are 3-D, and a
router, which hands it the experts of each token and their weights. Both are found in one short pass: the router is
the module that returned exactly what the experts were given.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunelens.errors import PrunelensError
from prunelens.models.anatomy import Block
from prunelens.models.loading import Model
from prunelens.models.probe import probe_ids
from prunelens.models.taps import Call, decoder_of, run_decoder

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
        if any(getattr(_text_config(model.network.config), name, None) for name in COUNTS):
            raise _refused(model, "its experts are not stacked in 3-D parameters")
        raise PrunelensError(f"expected a mixture of experts, found none in {_family(model)}; drop other parts of it")
    return found


def mask_experts(model: Model, dropped: Mapping[int, Collection[int]]) -> None:
    """Let the routers of a twin choose for good among the experts that are left, as if the others' rows were gone.

    Weights and buffers stay as they are. A second call replaces what an earlier one said about the same layers.

    Args:
        model: a twin, whose modules are its own.
        dropped: by layer_idx, the experts that go.

    Raises:
        PrunelensError: as `find_mixtures`, a layer or an expert that is not there, too few experts left, or groups
            that would differ in size.
    """
    mixtures = find_mixtures(model)
    check_dropped(model, mixtures, dropped)
    for layer_idx, experts in dropped.items():
        mixtures[layer_idx].router.forward = _Chooser(mixtures[layer_idx], experts)


def sliced_experts(model: Model, config: Any, state: dict[str, Tensor], dropped: Mapping[int, Collection[int]]) -> None:
    """Take experts out of a configuration and a state dict, both in place; the tensors themselves are not written to.

    Args:
        model: the model with all experts, or a twin of it that was masked.
        config: a copy of its configuration.
        state: tensors under the names of `model.network.state_dict()`.
        dropped: by layer_idx, the experts that go; every mixture must lose equally many.

    Raises:
        PrunelensError: as `mask_experts`, another number of experts in some layer, or a configuration that does not
            say how many experts there are.
    """
    mixtures = find_mixtures(model)
    check_dropped(model, mixtures, dropped)
    counts = {layer_idx: len(set(dropped.get(layer_idx, ()))) for layer_idx in mixtures}
    left = {mixture.num_experts - counts[layer_idx] for layer_idx, mixture in mixtures.items()}
    if len(left) > 1:
        raise PrunelensError(
            f"expected equally many experts left in every layer, because the configuration of {_family(model)} "
            f"holds one number, found {sorted(left)}; drop the same number in each of the layers {sorted(mixtures)}"
        )
    _set_count(model, config, next(iter(mixtures.values())).num_experts, left.pop())
    names = {module: name for name, module in model.network.named_modules()}
    for layer_idx, mixture in mixtures.items():
        kept = torch.tensor(mixture.kept(dropped.get(layer_idx, ())))
        for module, name, axis in mixture.tensors():
            full = f"{names[module]}.{name}"
            if full in state:
                state[full] = state[full].index_select(axis, kept.to(state[full].device))


def num_dropped_parameters(model: Model, dropped: Mapping[int, Collection[int]]) -> int:
    """Parameters that belong to the experts that go: their own, and their rows in the routers (no buffers).

    Raises:
        PrunelensError: as `mask_experts`.
    """
    mixtures = find_mixtures(model)
    check_dropped(model, mixtures, dropped)
    total = 0
    for layer_idx, experts in dropped.items():
        mixture = mixtures[layer_idx]
        for module, name, _ in mixture.tensors():
            weight = module._parameters.get(name)
            if weight is not None:
                total += weight.numel() // mixture.num_experts * len(set(experts))
    return total


def check_dropped(model: Model, mixtures: Mapping[int, Mixture], dropped: Mapping[int, Collection[int]]) -> None:
    """Refuse experts that are not there or that the routers cannot do without.

    Raises:
        PrunelensError: it is so.
    """
    for layer_idx, experts in dropped.items():
        if layer_idx not in mixtures:
            raise PrunelensError(
                f"expected a layer of {model.name} with a mixture of experts ({sorted(mixtures)}), found {layer_idx}"
            )
        mixture = mixtures[layer_idx]
        strange = sorted(set(experts) - set(range(mixture.num_experts)))
        if strange:
            raise PrunelensError(
                f"expected experts from 0 to {mixture.num_experts - 1} in layer {layer_idx}, found {strange[0]}"
            )
        check_kept(mixture, mixture.kept(experts))


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


class _Chooser:
    """A router's forward among the experts that are left: the router itself runs on the rows that are left.

    It is an object, not a closure, so that a copy of the network gets a chooser for the copied router.
    """

    def __init__(self, mixture: Mixture, dropped: Collection[int]) -> None:
        self.router, self.num_experts = mixture.router, mixture.num_experts
        self.index_at, self.rows_at = mixture.index_at, mixture.rows_at
        self.kept = torch.tensor(mixture.kept(dropped))
        tensors = [*self.router.parameters(), *self.router.buffers()]
        self.small = copy.deepcopy(self.router, {id(tensor): tensor for tensor in tensors})
        self.small.__dict__.pop("forward", None)
        for module in self.small.modules():
            for name, value in vars(module).items():
                if "expert" in name and type(value) is int and value == self.num_experts:
                    setattr(module, name, len(self.kept))
        own = set(self.router.modules())
        paths = {module: path for path, module in self.router.named_modules()}
        self.sliced = [(paths[module], name, axis) for module, name, axis in mixture.tensors() if module in own]

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """What the router returns, with the experts numbered as in the whole mixture, and −inf for those that go."""
        for path, name, axis in self.sliced:  # again each time, because a router's weights can be replaced
            now = getattr(self.router.get_submodule(path), name)
            small = self.small.get_submodule(path)
            owner = small._parameters if name in small._parameters else small._buffers
            owner[name] = now.index_select(axis, self.kept.to(now.device))
        output = self.small.forward(*map(self._cut, args), **{name: self._cut(value) for name, value in kwargs.items()})
        return tuple(self._restored(place, value) for place, value in enumerate(output))

    def _cut(self, value: Any) -> Any:
        """An argument with one value for each expert loses those that go."""
        if isinstance(value, Tensor) and value.shape == (self.num_experts,):
            return value[self.kept.to(value.device)]
        return value

    def _restored(self, place: int, value: Any) -> Any:
        if place == self.index_at:
            return self.kept.to(value.device)[value]
        if place in self.rows_at:
            whole = value.new_full((*value.shape[:-1], self.num_experts), -torch.inf)
            return whole.index_copy(-1, self.kept.to(value.device), value)
        return value


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
        raise _refused(model, f"{block.name} has {len(candidates)} mixtures")
    experts = candidates[0]
    num_experts = next(experts.parameters()).shape[0]
    given = routed(calls[experts].args, calls[experts].kwargs) if experts in calls else None
    if given is None:
        raise _refused(model, f"the experts of {block.name} are not called with states, chosen experts and weights")
    routers = [
        module
        for module in block.module.modules()
        if module in calls and _has_rows(module, num_experts) and _hands_out(calls[module].output, given)
    ]
    if len(routers) != 1:
        raise _refused(model, f"no module of {block.name} returns the chosen experts and the weights they get")
    holder = next(module for module in block.module.modules() if experts in set(module.children()))
    output = calls[routers[0]].output
    top_k = given.index.shape[-1]
    num_groups, min_kept = _groups(_text_config(model.network.config), top_k)
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


def _set_count(model: Model, config: Any, before: int, after: int) -> None:
    config = _text_config(config)
    names = [name for name in COUNTS if getattr(config, name, None) == before]
    if not names:
        raise _refused(model, f"its configuration does not say in one number that there are {before} experts")
    for name in names:
        setattr(config, name, after)


def _text_config(config: Any) -> Any:
    return config.get_text_config()


def _family(model: Model) -> str:
    return f"{model.name} (family {model.network.config.model_type})"


def _refused(model: Model, reason: str) -> PrunelensError:
    return PrunelensError(
        f"experts of {_family(model)} cannot be taken out: {reason}; drop other parts, or use a model of another family"
    )
