"""S5 measured: the compressed model drafts, the dense model checks, and both are timed against the dense model alone.

Texts are sampled from the whole vocabulary one at a time, which is how speculative decoding is used: it shortens
the wait for one text. A prompt is continued by the dense model alone and then with the draft, so that whatever
slows the machine down for a while slows both.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from prunelens.errors import PrunelensError
from prunelens.models.loading import Model, quiet
from prunelens.models.surgery import NOTHING, remove
from prunelens.models.twin import twin_of
from prunelens.models.variant import Variant
from prunelens.spaces.survival import agreed_length

WARM_UP = 8
"""Tokens written both ways before anything is timed."""


@dataclass(frozen=True)
class Round:
    """What a draft proposed at once: its tokens, from which token of the text on, and how long it took."""

    start: int
    token_ids: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Written:
    """One text and how it came about.

    Attributes:
        token_ids: the new tokens, EOS included where it was reached.
        seconds: the whole time.
        first_seconds: the part of it until the dense model had read the prompt.
        dense_calls: passes of the dense model.
        rounds: what the draft proposed; empty where the dense model wrote alone.
    """

    token_ids: tuple[int, ...]
    seconds: float
    first_seconds: float
    dense_calls: int
    rounds: tuple[Round, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """The speed that a reader of the text sees, the prompt included."""
        return len(self.token_ids) / self.seconds

    @property
    def examined(self) -> int:
        """Drafted tokens that were judged: those before the first rejected one, and that one."""
        return sum(min(kept + 1, judged) for kept, judged in self._kept())

    @property
    def accepted(self) -> int:
        """Drafted tokens that stand in the text."""
        return sum(kept for kept, _ in self._kept())

    def _kept(self) -> Iterator[tuple[int, int]]:
        """(tokens kept, tokens that could be kept) of each round; what replaces a rejected token is never the same."""
        for each in self.rounds:
            pairs = zip(self.token_ids[each.start :], each.token_ids, strict=False)
            same = [own == drafted for own, drafted in pairs]
            yield agreed_length(same, len(same)), len(same)


@dataclass(frozen=True)
class DraftRun:
    """The same prompts continued by the dense model alone and with a draft, one text each.

    Seconds per step leave out the first pass, which reads the prompt. With them, a text is written about
    tokens_per_dense_call / (num_drafted · cost_ratio + check_ratio) times as fast; the forecast (S5) takes
    check_ratio as 1.
    """

    plain: tuple[Written, ...]
    assisted: tuple[Written, ...]
    num_drafted: int

    @property
    def plain_tokens_per_second(self) -> float:
        """Speed of the dense model alone."""
        return _speed(self.plain)

    @property
    def assisted_tokens_per_second(self) -> float:
        """Speed with the draft."""
        return _speed(self.assisted)

    @property
    def speedup(self) -> float:
        """Speed with the draft over the speed without it; below 1 the draft makes it slower."""
        return self.assisted_tokens_per_second / self.plain_tokens_per_second

    @property
    def speedup_range(self) -> tuple[float, float]:
        """(lowest, highest) ratio of the two speeds on one prompt, and the overall ratio lies inside."""
        pairs = zip(self.assisted, self.plain, strict=True)
        found = [own.tokens_per_second / alone.tokens_per_second for own, alone in pairs]
        return min(*found, self.speedup), max(*found, self.speedup)

    @property
    def examined(self) -> int:
        """Drafted tokens that the dense model judged."""
        return sum(text.examined for text in self.assisted)

    @property
    def accepted(self) -> int:
        """Drafted tokens that it kept."""
        return sum(text.accepted for text in self.assisted)

    @property
    def acceptance(self) -> float | None:
        """Accepted over examined; None where nothing was drafted."""
        return self.accepted / self.examined if self.examined else None

    @property
    def tokens_per_dense_call(self) -> float:
        """New tokens for each pass of the dense model; num_drafted + 1 at most."""
        return sum(len(text.token_ids) for text in self.assisted) / sum(text.dense_calls for text in self.assisted)

    @property
    def cost_ratio(self) -> float | None:
        """Seconds for a drafted token over those for a token of the dense model alone; None if texts are too short."""
        later = [each for text in self.assisted for each in text.rounds[1:]]
        return _over(sum(each.seconds for each in later), sum(len(each.token_ids) for each in later), self._step())

    @property
    def check_ratio(self) -> float | None:
        """Seconds for judging a draft over those for a token of the dense model alone; None as above."""
        drafting = sum(each.seconds for text in self.assisted for each in text.rounds[1:])
        later = sum(text.seconds - text.first_seconds for text in self.assisted) - drafting
        return _over(later, sum(text.dense_calls - 1 for text in self.assisted), self._step())

    def _step(self) -> float | None:
        """Seconds for a token of the dense model alone."""
        later = sum(text.seconds - text.first_seconds for text in self.plain)
        return _over(later, sum(text.dense_calls - 1 for text in self.plain), 1.0)


def measure_draft(
    dense: Model,
    variant: Variant,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    num_drafted: int,
    temperature: float,
    seed: int,
    advance: Callable[[int], None] = lambda tokens: None,
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
    draft = twin_of(variant.model)
    remove(draft.anatomy, variant.drop)
    return draft


def write_plain(
    dense: Model, prompt: Sequence[int], max_new_tokens: int, temperature: float | None, seed: int
) -> Written:
    """The dense model's text by itself; greedy where `temperature` is None."""
    with _own_settings(dense, GenerationConfig()):
        return _write(dense, prompt, _settings(dense, max_new_tokens, temperature), seed)


def write_assisted(
    dense: Model,
    draft: Model,
    prompt: Sequence[int],
    max_new_tokens: int,
    num_drafted: int,
    temperature: float | None,
    seed: int,
) -> Written:
    """The dense model's text, `num_drafted` tokens at a time proposed by `draft`; greedy where `temperature` is None.

    Raises:
        PrunelensError: the draft's or the dense model's cache cannot be put back to before a rejected token.
    """
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
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PrunelensError(
            f"{draft.name} cannot draft for {dense.name} in this version of transformers: {reason}; leave out --draft"
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
) -> Written:
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
    return Written(token_ids, seconds, finished[0] - start, len(finished), tuple(rounds or ()))


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


def _speed(texts: Sequence[Written]) -> float:
    return sum(len(text.token_ids) for text in texts) / sum(text.seconds for text in texts)


def _over(seconds: float, count: int, unit: float | None) -> float | None:
    """Seconds for one of `count`, in units; None where nothing was counted."""
    return seconds / count / unit if count and unit else None
