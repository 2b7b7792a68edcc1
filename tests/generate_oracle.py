"""Writing by transformers' own loop, one row after the other choosing by itself: what `write` must give."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

Choose = Callable[[int, torch.Tensor], int]


def choose_best(step: int, logits: torch.Tensor) -> int:
    """The most likely token, the lowest id among equals."""
    return int(np.argmax(logits.numpy()))


def choose_drawn(uniforms: np.ndarray, temperature: float) -> Choose:
    """A draw from the whole vocabulary by the number of its step."""

    def choose(step: int, logits: torch.Tensor) -> int:
        probs = torch.softmax(logits.double() / temperature, dim=-1)
        cumulative = torch.cumsum(probs, dim=0)
        return min(int(torch.searchsorted(cumulative, cumulative[-1] * uniforms[step], right=True)), len(probs) - 1)

    return choose


def generate(
    network: Any,
    decoder: Any,
    prompts: Sequence[Sequence[int]],
    chosen: Sequence[Choose],
    steps: int,
    eos_ids: set[int],
) -> list[tuple[list[int], torch.Tensor]]:
    """(tokens, states that entered the head) of each prompt; all go on until the last has ended."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    states: list[torch.Tensor] = []

    def leave_one(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        left = torch.full_like(scores, -torch.inf)
        for row, choose in enumerate(chosen):
            left[row, choose(input_ids.shape[1] - longest, scores[row])] = 0
        return left

    config = GenerationConfig(max_new_tokens=steps, do_sample=False, eos_token_id=sorted(eos_ids), pad_token_id=0)
    handle = decoder.register_forward_hook(lambda *call: states.append(call[2].last_hidden_state[:, -1].clone()))
    own, network.generation_config = network.generation_config, GenerationConfig()
    try:
        with torch.inference_mode():
            written = network.generate(ids, attention_mask=mask, generation_config=config, logits_processor=[leave_one])
    finally:
        handle.remove()
        network.generation_config = own
    found = []
    for row, tokens in enumerate(written[:, longest:].tolist()):
        stop = next((at + 1 for at, token in enumerate(tokens) if token in eos_ids), len(tokens))
        found.append((tokens[:stop], torch.stack(states, dim=1)[row, :stop]))
    return found
