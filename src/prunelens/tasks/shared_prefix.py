"""Log-likelihoods of continuations whose contexts begin alike: what they share is read once, from the cache on."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from prunelens.models.anatomy.hooks import decoder_of
from prunelens.models.batches import pad_right
from prunelens.models.model import Model

Ids = tuple[int, ...]
Answer = tuple[float, bool]
"""(log-likelihood in nats, whether every token is the most likely one)."""
LONG_PREFIX = 16
"""Tokens; a shorter start that all contexts share is not worth a pass of its own."""


def shares_prefixes(model: Model) -> bool:
    """Whether the model can go on from one cache with several rows: full attention alone, and a cache that is right."""
    if not (model.anatomy.manner.cached and model.anatomy.batching.is_free):
        return False
    decoder = decoder_of(model.network)
    if "cache" not in inspect.signature(type(decoder).forward).parameters:
        return False
    with torch.inference_mode():
        cache = getattr(
            decoder(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=True), "cache", None
        )
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def has_shared_start(requests: Sequence[tuple[Ids, Ids]]) -> bool:
    """Whether contexts come more than once, or all of them begin alike."""
    contexts = {context for context, _ in requests}
    return len(contexts) < len(requests) or bool(_shared_start(list(contexts)))


def continuation_answers(
    model: Model,
    requests: Sequence[tuple[Ids, Ids]],
    rows: int,
    done: Callable[[Sequence[int], Sequence[Answer]], None],
) -> list[Answer]:
    """The answer to each request for the log-likelihood of a continuation after a context.

    Contexts of one length are read side by side, so that nothing is padded before a continuation ends.

    Args:
        model: one for which `shares_prefixes` holds.
        requests: token ids of context and continuation, at least one each, that fit the model's context together.
        rows: continuations read side by side.
        done: called with the places of requests that are answered, and their answers.
    """
    by_context: dict[Ids, list[int]] = {}
    for place, (context, _) in enumerate(requests):
        by_context.setdefault(context, []).append(place)
    found: dict[int, Answer] = {}
    shared = _shared_start(list(by_context))
    with torch.inference_mode():
        start = _run(model, torch.tensor([shared], device=model.device), None)[1] if shared else None
        for contexts in _batches(by_context, rows):
            ids = torch.tensor([context[len(shared) :] for context in contexts], device=model.device)
            states, cache = _run(model, ids, _copies(start, [0] * len(contexts)))
            owners = [(row, place) for row, context in enumerate(contexts) for place in by_context[context]]
            for part in range(0, len(owners), rows):
                chosen = owners[part : part + rows]
                conts = [requests[place][1] for _, place in chosen]
                answers = _read(model, states[:, -1], cache, [row for row, _ in chosen], conts)
                places = [place for _, place in chosen]
                found |= dict(zip(places, answers, strict=True))
                done(places, answers)
    return [found[place] for place in range(len(requests))]


def _shared_start(contexts: Sequence[Ids]) -> Ids:
    """What all contexts begin with, short of the last token of the shortest; nothing where that is little."""
    first, last = min(contexts), max(contexts)
    count = next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), None)
    longest = min(map(len, contexts)) - 1
    count = longest if count is None else min(count, longest)
    return first[:count] if count >= LONG_PREFIX and len(contexts) > 1 else ()


def _batches(by_context: dict[Ids, list[int]], rows: int) -> Iterator[list[Ids]]:
    """Contexts of one length whose continuations fill about `rows` rows, the longest first."""
    for _, group in groupby(sorted(by_context, key=lambda context: -len(context)), key=len):
        batch: list[Ids] = []
        for context in group:
            if batch and sum(len(by_context[one]) for one in batch) + len(by_context[context]) > rows:
                yield batch
                batch = []
            batch.append(context)
        yield batch


def _run(model: Model, ids: Int64[Tensor, "B T"], cache: Any) -> tuple[Float[Tensor, "B T d"], Any]:
    found = decoder_of(model.network)(input_ids=ids, cache=cache, use_cache=True)
    return found.last_hidden_state, found.cache


def _copies(cache: Any, rows: Sequence[int]) -> Any:
    """A cache of its own that holds these rows of another."""
    if cache is None:
        return None
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]  # tensors are shared until they are selected from
    chosen.batch_select_indices(torch.tensor(rows, device=_device(cache)))
    return chosen


def _device(cache: Any) -> torch.device:
    device: torch.device = next(layer.keys.device for layer in cache.layers if layer.keys is not None)
    return device


def _read(
    model: Model, last: Float[Tensor, "B d"], cache: Any, rows: Sequence[int], conts: Sequence[Ids]
) -> list[Answer]:
    """The answers to continuations, each after the context in its row."""
    states = [[last[row]] for row in rows]
    longer = [index for index, cont in enumerate(conts) if len(cont) > 1]
    if longer:
        ids, lengths = pad_right([conts[index][:-1] for index in longer], model.device)
        found, _ = _run(model, ids, _copies(cache, [rows[index] for index in longer]))
        for index, own, length in zip(longer, found, lengths.tolist(), strict=True):
            states[index].extend(own[:length])
    flat = torch.stack([state for row in states for state in row])
    tokens = torch.tensor([token for cont in conts for token in cont], device=flat.device)
    logits = torch.log_softmax(model.head(flat).to(flat.device), dim=-1)
    costs = logits.gather(1, tokens[:, None])[:, 0].split([len(cont) for cont in conts])
    likely = (logits.argmax(dim=-1) == tokens).split([len(cont) for cont in conts])
    return [(float(cost.sum()), bool(best.all())) for cost, best in zip(costs, likely, strict=True)]
