"""L5: one position, after the prompt: the whole vocabulary against the option tokens (C1)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.metrics.distributions import pair_stats
from prunelens.metrics.head import Head, Pair, stream_pairs
from prunelens.tasks.prompts import Prompt

Row = dict[str, Tensor]


def prompt_end_stats(
    prompts: Sequence[Prompt],
    states: Float[Tensor, "P d"],
    head: Head,
    pairs: Sequence[Pair],
    temperature: float,
) -> list[dict[str, list[tuple[int, Row]]]]:
    """Row statistics after each prompt, over the vocabulary and over the options.

    Args:
        prompts: P prompts.
        states: dense states that enter the head after each prompt.
        head: the dense head.
        pairs: compressed states of the same shape, with their heads.
        temperature: T of the softmax.

    Returns:
        For each pair and space (`vocabulary`, `options`) a list of (prompt index, statistics of one row); the
        row's `token_id` is the right option's token where the prompt names it, else the dense top 1.
    """
    with torch.inference_mode():
        logits = torch.cat([head(state.unsqueeze(0)) for state in states])
        options = [_answer_index(prompt) for prompt in prompts]
        tokens = logits.argmax(-1)
        for index, (prompt, answer) in enumerate(zip(prompts, options, strict=True)):
            if answer is not None:
                tokens[index] = prompt.option_ids[answer]
        whole = stream_pairs(states, head, pairs, tokens, temperature)
        return [
            {
                "vocabulary": [(index, _row(stats, index, tokens)) for index in range(len(prompts))],
                "options": _option_rows(prompts, logits, pair, temperature, stats),
            }
            for pair, stats in zip(pairs, whole, strict=True)
        ]


def _row(stats: Row, index: int, tokens: Tensor) -> Row:
    row = {name: value[index : index + 1] for name, value in stats.items()}
    return row | {"token_id": tokens[index : index + 1].cpu()}


def _option_rows(
    prompts: Sequence[Prompt], logits: Tensor, pair: Pair, temperature: float, whole: Row
) -> list[tuple[int, Row]]:
    rows = []
    for index, prompt in enumerate(prompts):
        if not prompt.option_ids:
            continue
        ids = torch.tensor(prompt.option_ids, device=logits.device)
        dense = logits[index : index + 1, ids]
        compressed = pair.head(pair.states[index : index + 1]).to(logits.device)[:, ids]
        answer = _answer_index(prompt)
        reference = dense.argmax(-1) if answer is None else torch.tensor([answer], device=ids.device)
        stats = {name: value.cpu() for name, value in pair_stats(dense, compressed, reference, temperature).items()}
        hidden = {name: whole[name][index : index + 1] for name in whole if name.startswith("hidden_")}
        rows.append((index, stats | hidden | {"token_id": ids[reference].cpu()}))
    return rows


def _answer_index(prompt: Prompt) -> int | None:
    """Index of the right option, where the prompt names one that is among its options."""
    if not prompt.option_ids or prompt.answer not in prompt.options:
        return None
    return prompt.options.index(prompt.answer)
