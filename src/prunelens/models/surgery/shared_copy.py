"""A second model with modules of its own that shares every weight with the first until one is replaced."""

import copy
from itertools import chain

from torch import Tensor, nn

from prunelens.errors import PrunelensError
from prunelens.models.model import Model


def shared_copy_of(model: Model, name: str | None = None) -> Model:
    """A model whose parameters and buffers are those of `model`, so that it costs no memory by itself.

    Weights are replaced by `set_weight`, never written in place: the tensors belong to both.

    Raises:
        PrunelensError: weights that wait in main memory or on disk.
    """
    tensors: list[Tensor] = [*model.network.parameters(), *model.network.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise PrunelensError(
            f"{model.name} is offloaded, and weights can be changed only where they are in memory whole; choose a "
            "smaller --dtype or a larger device (drop recipes work offloaded)"
        )
    memo = {id(tensor): tensor for tensor in tensors}
    network, anatomy = copy.deepcopy((model.network, model.anatomy), memo)
    return Model(
        name or model.name,
        network,
        model.tokenizer,
        anatomy,
        model.fingerprint,
        trust_remote_code=model.trust_remote_code,
        spread=model.spread,
        source=model.source,
    )


def set_weight(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module another parameter in place of the one called `name`, which stays as it is for other owners."""
    module._parameters[name] = nn.Parameter(value, requires_grad=False)


def named_owners(network: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """For each parameter by its full name, the module that holds it and what it is called there."""
    owners = ((prefix, module) for prefix, module in network.named_modules())
    return dict(
        chain.from_iterable(
            ((f"{prefix}.{name}" if prefix else name, (module, name)) for name in module._parameters)
            for prefix, module in owners
        )
    )
