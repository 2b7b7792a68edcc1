"""S5 measured: the compressed model drafts, the dense model checks, and both are timed against the dense model alone.

Texts are sampled from the whole vocabulary one at a time, which is how speculative decoding is used: it shortens
the wait for one text. A prompt is continued by the dense model alone and then with the draft, so that whatever
slows the machine down for a while slows both.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.quiet import quiet
from prunelens.models.surgery.drop import NOTHING, remove
from prunelens.models.surgery.shared_copy import shared_copy_of
from prunelens.models.surgery.variant import Variant
from prunelens.progress import Advance, unreported
from prunelens.tracing.draft_run import DraftedText, DraftRun, Round

WARM_UP = 8
"""Tokens written both ways before anything is timed."""


def measure_draft(
    dense: Model,
    variant: Variant,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    num_drafted: int,
    temperature: float,
    seed: int,
    advance: Advance = unreported,
) -> DraftRun:
    """Continue each prompt alone and with the draft, and take the time of both.

    Args:
        dense: the model whose text it is.
        variant: the compressed model that drafts.
        prompts: token ids, one a text, at least one.
        max_new_tokens: the longest text.
        num_drafted: tokens drafted for each pass of the dense model.
        temperature: of the softmax; tokens are drawn from the whole vocabulary.
        seed: of the draws, which the random state of the caller does not enter.
        advance: called with the number of tokens finished, 2 · max_new_tokens for each prompt.

    Raises:
        PrunelensError: the family's cache cannot be put back, or the model is offloaded.
    """
    draft = draft_of(variant, dense)
    plain, assisted = [], []
    short = min(WARM_UP, max_new_tokens)
    write_plain(dense, prompts[0], short, temperature, seed)
    write_assisted(dense, draft, prompts[0], short, num_drafted, temperature, seed)
    for row, prompt in enumerate(prompts):
        plain.append(write_plain(dense, prompt, max_new_tokens, temperature, seed + row))
        advance(max_new_tokens)
        assisted.append(write_assisted(dense, draft, prompt, max_new_tokens, num_drafted, temperature, seed + row))
        advance(max_new_tokens)
    return DraftRun(tuple(plain), tuple(assisted), num_drafted)


def draft_of(variant: Variant, dense: Model) -> Model:
    """The compressed model with modules of its own, which share their weights with the dense model's where it can.

    Raises:
        PrunelensError: the model is offloaded.
    """
    if variant.model is not dense and variant.drop == NOTHING:
        return variant.model
    draft = shared_copy_of(variant.model)
    remove(draft.anatomy, variant.drop)
    return draft


def write_plain(
    dense: Model, prompt: Sequence[int], max_new_tokens: int, temperature: float | None, seed: int
) -> DraftedText:
    """The dense model's text by itself; greedy where `temperature` is None."""
    settings = _settings(dense, max_new_tokens, temperature)
    with _own_settings(dense, GenerationConfig()):
        return _write(dense, prompt, settings, seed)


def write_assisted(
    dense: Model,
    draft: Model,
    prompt: Sequence[int],
    max_new_tokens: int,
    num_drafted: int,
    temperature: float | None,
    seed: int,
) -> DraftedText:
    """The dense model's text, `num_drafted` tokens at a time proposed by `draft`; greedy where `temperature` is None.

    Raises:
        PrunelensError: a model's cache is not right, or cannot be put back to before a rejected token.
    """
    for model in (dense, draft):
        if not model.anatomy.manner.cached:
            raise PrunelensError(
                f"expected a cache that gives the states of a whole pass, which drafting needs, found that "
                f"the cache of {model.name} does not; leave out --draft"
            )
    drafting = GenerationConfig(
        num_assistant_tokens=num_drafted, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0
    )
    rounds: list[Round] = []
    settings = _settings(dense, max_new_tokens, temperature)
    try:
        with (
            _own_settings(dense, GenerationConfig()),
            _own_settings(draft, drafting),
            _watched_draft(draft, len(prompt), rounds),
        ):
            return _write(dense, prompt, settings, seed, rounds, assistant_model=draft.network)
    except Exception as error:  # families refuse, or break, in ways of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise PrunelensError(
            f"transformers cannot run {dense.name} with this draft ({reason}); leave out --draft"
        ) from error


def _settings(dense: Model, max_new_tokens: int, temperature: float | None) -> GenerationConfig:
    sampling = {} if temperature is None else {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature is not None,
        eos_token_id=dense.eos_ids or None,
        pad_token_id=dense.eos_ids[0] if dense.eos_ids else 0,
        use_cache=True,
        **sampling,
    )


def _write(
    dense: Model,
    prompt: Sequence[int],
    settings: GenerationConfig,
    seed: int,
    rounds: list[Round] | None = None,
    **more: Any,
) -> DraftedText:
    """Generate one text; `rounds` are filled meanwhile."""
    ids = torch.tensor([list(prompt)], device=dense.device)
    finished: list[float] = []
    hook = dense.network.register_forward_hook(lambda *call: finished.append(_now(dense)))
    try:
        with torch.inference_mode(), _seeded(dense, seed), quiet():
            start = _now(dense)
            written = dense.network.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=settings, **more
            )
            seconds = _now(dense) - start
    finally:
        hook.remove()
    token_ids = tuple(written[0, ids.shape[1] :].tolist())
    return DraftedText(token_ids, seconds, finished[0] - start, len(finished), tuple(rounds or ()))


@contextmanager
def _own_settings(model: Model, settings: GenerationConfig) -> Iterator[None]:
    """Keep the checkpoint's own settings of generation out."""
    own, model.network.generation_config = model.network.generation_config, settings
    try:
        yield
    finally:
        model.network.generation_config = own


@contextmanager
def _watched_draft(draft: Model, prompt_length: int, rounds: list[Round]) -> Iterator[None]:
    """Note what the draft proposes and how long it takes."""
    generate = draft.network.generate

    def watched(input_ids: torch.Tensor, **settings: Any) -> Any:
        start = _now(draft)
        found = generate(input_ids, **settings)
        seconds = _now(draft) - start
        length = input_ids.shape[1]
        rounds.append(Round(length - prompt_length, tuple(found.sequences[0, length:].tolist()), seconds))
        return found

    draft.network.generate = watched
    try:
        yield
    finally:
        del draft.network.generate


@contextmanager
def _seeded(model: Model, seed: int) -> Iterator[None]:
    """Draw from this seed, and leave the caller's random state as it was."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _now(model: Model) -> float:
    """Seconds on a clock, when everything that was started on the device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
