"""Mixtures of experts: take experts out of the choice, and slice them away for good."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.surgery.mixtures import COUNTS, Mixture, check_kept, family_of, find_mixtures, refused


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
            f"expected equally many experts left in every layer, because the configuration of {family_of(model)} "
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
        unexpected = sorted(set(experts) - set(range(mixture.num_experts)))
        if unexpected:
            raise PrunelensError(
                f"expected experts from 0 to {mixture.num_experts - 1} in layer {layer_idx}, found {unexpected[0]}"
            )
        check_kept(mixture, mixture.kept(experts))


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


def _set_count(model: Model, config: Any, before: int, after: int) -> None:
    config = config.get_text_config()
    names = [name for name in COUNTS if getattr(config, name, None) == before]
    if not names:
        raise refused(model, f"its configuration does not say in one number that there are {before} experts")
    for name in names:
        setattr(config, name, after)
