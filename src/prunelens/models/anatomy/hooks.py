"""Read the residual stream while a model runs, and run it again from the middle.

Replay: the decoder's own forward is called with the layers before `start` returning what was recorded, so
masks, position embeddings and the final norm are computed by the model itself and no family's code is
copied. The head works the same way: the model's own forward after the decoder, with given states.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast


class _GivenStates(BaseModelOutputWithPast):
    """States in place of a decoder's output; what else a family's head may ask for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that turns token ids into the states that enter the head.

    That is what the model says; where it names itself, another model with a head, or its head, or says nothing, it
    is the first module inside that reads token ids and does not write.

    Raises:
        LookupError: there is none.
    """
    try:
        found = model.get_decoder()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        found = model
    for module in (found, *found.modules(), *model.modules()):
        if module is not model and not hasattr(module, "generate") and _reads_ids(module):
            return module
    raise LookupError(f"{type(model).__name__} has no decoder inside")


def _reads_ids(module: nn.Module) -> bool:
    return "input_ids" in inspect.signature(type(module).forward).parameters


def run_decoder(decoder: nn.Module, ids: Int64[Tensor, "B T"]) -> Float[Tensor, "B T d"]:
    """States that enter the head, for token ids without left padding and on their device; no cache, no mask.

    Right padding needs no mask: a causal model's states do not depend on what comes after them.
    """
    return decoder(input_ids=ids, use_cache=False).last_hidden_state.to(ids.device)


def head_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function from states (rows, d) to logits (rows, V), bias, scaling and soft-capping included."""

    def head(states: Float[Tensor, "rows d"]) -> Float[Tensor, "rows V"]:
        with torch.inference_mode():
            return run_head(model, states)

    return head


def run_head(model: nn.Module, states: Float[Tensor, "rows d"]) -> Float[Tensor, "rows V"]:
    """Logits of states, as `head_of`, in the caller's gradient mode."""

    def given(*args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return _GivenStates(last_hidden_state=states.unsqueeze(0))

    ids = torch.zeros(1, states.shape[0], dtype=torch.int64, device=states.device)
    with replaced_forward({decoder_of(model): given}):
        return model(input_ids=ids, use_cache=False).logits.squeeze(0)


@contextmanager
def replaced_forward(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another forward and put their own back afterwards; nests."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


@contextmanager
def record_outputs(layers: Sequence[nn.Module], indices: Sequence[int]) -> Iterator[dict[int, Any]]:
    """Collect what the layers with these indices return while the body runs the model."""
    recorded: dict[int, Any] = {}

    def recorder(index: int) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            recorded[index] = output

        return record

    handles = [layers[index].register_forward_hook(recorder(index)) for index in indices]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replay_from(layers: Sequence[nn.Module], start: int, output: Any) -> Iterator[None]:
    """Let every layer before `start` return `output`, recorded from layer `start - 1`, at no cost."""

    def given(*args: Any, **kwargs: Any) -> Any:
        return output

    with replaced_forward(dict.fromkeys(layers[:start], given)):
        yield


def first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first item of a tuple or list if that is a tensor."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def input_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden states a module was called with: the first tensor, by position or by name."""
    values = [*args, kwargs.get("hidden_states"), *kwargs.values()]
    return next((value for value in values if isinstance(value, Tensor)), None)


@dataclass(frozen=True)
class Call:
    """One run of a module: what it was given and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def has_source(self) -> bool:
        """Whether it was given a tensor at all."""
        return input_tensor(self.args, self.kwargs) is not None

    @property
    def source(self) -> Tensor:
        """The hidden states it read."""
        found = input_tensor(self.args, self.kwargs)
        assert found is not None
        return found

    @property
    def arguments(self) -> dict[Any, Any]:
        """What it was given, by position or name."""
        return {**dict(enumerate(self.args)), **self.kwargs}

    def again(
        self, module: nn.Module, source: Tensor, others: Mapping[int | str, Any] = MappingProxyType({})
    ) -> Tensor:
        """What `module` makes of the same call with other hidden states, and `others` by position or name."""
        read = self.source
        args = [source if value is read else others.get(place, value) for place, value in enumerate(self.args)]
        kwargs = {name: source if value is read else others.get(name, value) for name, value in self.kwargs.items()}
        found = first_tensor(module(*args, **kwargs))
        assert found is not None
        return found


@dataclass(frozen=True)
class Returned:
    """What a module returns beside its hidden states.

    Attributes:
        num_outputs: 0 for a tensor alone, else the length of the tuple.
        states: for each output after the first, the argument, by position or name, in which the module is given
            the state that this output carries on, or None for an output that is no state.
    """

    num_outputs: int
    states: tuple[int | str | None, ...] = ()

    def around(self, tensor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor as the module returns it when it was called so: states come back as they were given."""
        if not self.num_outputs:
            return tensor
        given = Call(args, kwargs, None).arguments
        places = self.states or (None,) * (self.num_outputs - 1)
        return (tensor, *(None if place is None else given.get(place) for place in places))


def returned_by(call: Call | None) -> Returned:
    """What a run tells: an output that looks like an argument in all its sizes is a state that is carried on."""
    output = call.output if call is not None else None
    if call is None or not isinstance(output, tuple | list):
        return Returned(0)
    shapes = {place: _shape(value) for place, value in call.arguments.items()}
    places = [
        next((place for place, shape in shapes.items() if shape and shape == _shape(own)), None) for own in output[1:]
    ]
    return Returned(len(output), tuple(places))


def _shape(value: Any) -> Any:
    """The sizes of a tensor or of tensors in tuples; empty for anything else."""
    if isinstance(value, tuple | list):
        return tuple(map(_shape, value))
    return value.shape if isinstance(value, Tensor) else ()
