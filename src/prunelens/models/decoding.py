"""Cached decoding by transformers' own loop, keeping the states that enter the head."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from prunelens.models.anatomy.hooks import decoder_of


def decode(
    network: Any,
    ids: Int64[Tensor, "B T"],
    mask: Int64[Tensor, "B T"],
    max_new_tokens: int,
    eos_ids: list[int],
    chooser: LogitsProcessor | None = None,
    finished: StoppingCriteria | None = None,
    cached: bool = True,
) -> tuple[Int64[Tensor, "B N"], Float[Tensor, "B N d"]]:
    """New tokens of left-padded prompts, and the state that entered the head before each of them.

    The checkpoint's own generation settings are set aside: the most likely token is taken.

    Args:
        network: the transformers model.
        ids: prompts, padded on the left.
        mask: 0 where a prompt is padded.
        max_new_tokens: at most so many; fewer where every row has ended.
        eos_ids: tokens that end a row; a row that has ended is padded with the first of them.
        chooser: leaves one token of each row's logits.
        finished: tells which rows end for another reason.
        cached: whether the cache is used; without it every token takes a pass over all before it.
    """
    states: list[Tensor] = []

    def keep_state(module: Any, args: Any, output: Any) -> None:
        states.append(output.last_hidden_state[:, -1].clone())

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_ids or None,
        pad_token_id=eos_ids[0] if eos_ids else 0,
        use_cache=cached,
    )
    handle = decoder_of(network).register_forward_hook(keep_state)
    own, network.generation_config = network.generation_config, GenerationConfig()
    try:
        with torch.inference_mode():
            written = network.generate(
                ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=[chooser] if chooser is not None else None,
                stopping_criteria=[finished] if finished is not None else None,
            )
    finally:
        handle.remove()
        network.generation_config = own
    return written[:, ids.shape[1] :], torch.stack(states, dim=1)
