"""Cached decoding, a step at a time: the state that enters the head, the tokens chosen, and the rows that go on.

transformers prepares what a family needs (positions, masks, its cache). The loop over the steps is here, so that a
text that has ended costs nothing more, and a prompt that several texts continue is read once.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import Cache, GenerationConfig

from prunelens.models.anatomy.hooks import decoder_of
from prunelens.models.roomy_cache import make_room

Rows = Sequence[int]
"""Rows of a batch by their place in it, in the order in which they go on; one may go on several times."""


@runtime_checkable
class Writer(Protocol):
    """Chooses the tokens of a batch, a step at a time."""

    def choose(
        self, states: Float[Tensor, "B d"], logits: Float[Tensor, "B V"]
    ) -> tuple[Int64[Tensor, " B"], Rows | None]:
        """(The next token of each row, the rows that go on); None stands for all rows, and no row ends the batch."""
        ...


def decode(
    network: Any,
    ids: Int64[Tensor, "P T"],
    mask: Int64[Tensor, "P T"],
    max_new_tokens: int,
    writer: Writer,
    cached: bool = True,
    rows: Rows | None = None,
) -> None:
    """Continue left-padded prompts with the tokens that `writer` chooses.

    The checkpoint's own generation settings are set aside.

    Args:
        network: the transformers model.
        ids: prompts, padded on the left.
        mask: 0 where a prompt is padded.
        max_new_tokens: steps at most.
        writer: is given the states that enter the head and their logits in float32, once a step.
        cached: whether the cache is used; without it every token takes a pass over all before it.
        rows: the prompts that the first step continues; None for each of them once.

    Raises:
        LookupError: rows are to leave or to be repeated, and the family keeps their past where nobody else can reach.
    """
    entered: list[Tensor] = []

    def keep_state(module: Any, args: Any, output: Any) -> None:
        entered[:] = [output.last_hidden_state[:, -1]]

    def loop(network: Any, input_ids: Tensor, generation_config: Any, **settings: Any) -> Tensor:
        """What `generate` runs in place of its own loop."""
        batch = _Batch(network, input_ids, settings)
        make_room(settings.get("cache"), input_ids.shape[1] + max_new_tokens)
        outputs = network._prefill(input_ids, generation_config, settings)
        with network._optimize_model_for_decode():
            for step in range(max_new_tokens):
                outputs = batch.forward() if step else outputs
                batch.update(outputs)
                states, logits = (one.to(ids.device) for one in (entered.pop(), outputs.logits[:, -1]))
                if rows is not None and not step:
                    states, logits = states[list(rows)], logits[list(rows)]
                    batch.keep(rows)
                tokens, going_on = writer.choose(states, logits.float())
                if going_on is not None and not going_on:
                    break
                batch.append(tokens)
                if going_on is not None:
                    batch.keep(going_on)
        return input_ids

    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, use_cache=cached)
    handle = decoder_of(network).register_forward_hook(keep_state)
    own, network.generation_config = network.generation_config, GenerationConfig()
    try:
        with torch.inference_mode():
            network.generate(ids, attention_mask=mask, generation_config=config, custom_generate=loop)
    finally:
        handle.remove()
        network.generation_config = own


class _Batch:
    """The rows that are running, and what the network is given next."""

    def __init__(self, network: Any, ids: Int64[Tensor, "B T"], settings: dict[str, Any]) -> None:
        settings.pop("logits_processor")
        settings.pop("stopping_criteria")
        self._network = network
        self._ids = ids
        self._settings = settings

    def forward(self) -> Any:
        """The next step: of the last tokens alone where there is a cache."""
        length = 1 if self._settings["use_cache"] else None
        inputs = self._network.prepare_inputs_for_generation(self._ids, next_sequence_length=length, **self._settings)
        return self._network(**inputs, return_dict=True)

    def update(self, outputs: Any) -> None:
        """Take over the cache, and count on what is counted."""
        self._settings = self._network._update_model_kwargs_for_generation(outputs, self._settings)

    def append(self, tokens: Int64[Tensor, " B"]) -> None:
        """The tokens that were chosen."""
        self._ids = torch.cat([self._ids, tokens.unsqueeze(1)], dim=1)

    def keep(self, rows: Rows) -> None:
        """Go on with these rows only."""
        count, index = self._ids.shape[0], torch.tensor(rows, device=self._ids.device)
        self._ids = self._ids[index]
        for name, value in self._settings.items():
            dim = -2 if name == "position_ids" else 0
            if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[dim] == count:
                self._settings[name] = value.index_select(dim, index.to(value.device))
        if self._settings["use_cache"]:
            cache = self._settings.get("cache")
            if not isinstance(cache, Cache):
                raise LookupError(
                    f"{type(self._network).__name__} keeps the past of its rows in {type(cache).__name__}"
                )
            cache.reorder_cache(index)  # type: ignore[arg-type]
