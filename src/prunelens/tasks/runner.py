"""The harness's own model class around a network in memory; imported only where tasks are run."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from lm_eval.models.huggingface import HFLM

from prunelens.models.model import Model
from prunelens.models.texts import told_ending, without_ending
from prunelens.progress import Advance, unreported
from prunelens.tasks.kept_answers import TaskAnswers
from prunelens.tasks.requests import Item, seed_everything
from prunelens.tasks.shared_prefix import Answer, continuation_answers, has_shared_start, shares_prefixes

SHAPES: dict[str, Callable[[Any], Any]] = {
    "loglikelihood": tuple,
    "loglikelihood_rolling": float,
    "generate_until": str,
}
"""What makes an answer of each kind from a kept one."""


class _Runner(HFLM):
    """Runs a network as it is, tells how many requests are done, and passes over those whose answer is kept."""

    def __init__(
        self, model: Model, batch_size: int, started: Callable[[int], Advance], kept: TaskAnswers | None
    ) -> None:
        self._opened, self._started, self._kept = model, started, kept
        self._cached = model.anatomy.manner.cached
        self._advance: Advance = unreported
        super().__init__(
            pretrained=model.network, tokenizer=copy.deepcopy(model.tokenizer), batch_size=batch_size, backend="causal"
        )

        self._ending = told_ending(model)
        if kept is not None:
            self.cache_hook = _Keeper(kept)

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        """Token ids of a text, without the special tokens that a tokenizer may put behind it."""
        ids = list(super().tok_encode(string, *args, **options))
        if not self._ending or ids == list(self.tokenizer.encode(string, add_special_tokens=False)):
            return ids
        return without_ending(ids, self._ending)

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask of texts padded on the left, without what the tokenizer may put behind each."""
        size, bos = len(self._ending), self.tokenizer.bos_token
        if bos and strings[0].startswith(bos):
            size = 0  # the harness adds no special tokens then
        longest = left_truncate_len + size if left_truncate_len else None
        ids, mask = super().tok_batch_encode(list(strings), padding_side, longest, **options)
        return ids[:, : ids.shape[1] - size], mask[:, : mask.shape[1] - size]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Log-likelihoods of continuations."""
        return self._counted("loglikelihood", super().loglikelihood, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Greedy texts up to a stop."""
        return self._counted("generate_until", super().generate_until, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Log-likelihoods of whole texts."""
        return self._counted("loglikelihood_rolling", super().loglikelihood_rolling, requests)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Any]:
        """As the harness; what contexts share is read once where the model's cache allows it."""
        ids = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        fits = all(context and len(context) + len(continuation) <= self.max_length for context, continuation in ids)
        is_rolling = any(text is None for text, _, _ in requests)
        if is_rolling or not fits or not has_shared_start(ids) or not shares_prefixes(self._opened):
            found: list[Any] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return found
        return continuation_answers(self._opened, ids, int(self.batch_size), self._tell(requests))

    def _tell(self, requests: Sequence[Any]) -> Callable[[Sequence[int], Sequence[Answer]], None]:
        """Passes answers on as soon as they are there."""

        def done(places: Sequence[int], answers: Sequence[Answer]) -> None:
            for place, answer in zip(places, answers, strict=True):
                self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
            self._advance(len(places))

        return done

    def _counted(self, kind: str, run: Callable[..., Any], requests: list[Any]) -> list[Any]:
        done, tell = 0, self._started(len(requests))

        def advance(count: int) -> None:
            nonlocal done
            count = min(count, len(requests) - done)
            done += count
            tell(count)

        self._advance = advance
        found = [known_answer(self._kept, kind, request) for request in requests]
        missing = [request for request, answer in zip(requests, found, strict=True) if answer is None]
        advance(len(requests) - len(missing))
        new = iter(run(missing, disable_tqdm=True) if missing else ())
        advance(len(requests) - done)
        return [next(new) if answer is None else answer for answer in found]

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: the harness would ask the hub."""
        return {}

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = super()._model_call(inps, *args, **kwargs)
        self._advance(inps.shape[0])
        return found

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self._cached else _without_cache(self.model):
            found = super()._model_generate(context, *args, **kwargs)
        self._advance(context.shape[0])
        return found


@contextmanager
def _without_cache(network: Any) -> Iterator[None]:
    """Let every token take a whole pass, whatever the harness asks for."""
    own = network.generate
    with patch.object(network, "generate", lambda **settings: own(**settings | {"use_cache": False})):
        yield


class _Keeper:
    """Stands in for the harness's own cache, which is told of every answer as soon as it is there."""

    def __init__(self, kept: TaskAnswers) -> None:
        self._kept = kept

    def add_partial(self, kind: str, request: Sequence[Any], answer: Any) -> None:
        """Keep an answer that another run would give too."""
        if _is_fixed(kind, request):
            self._kept.add(kind, request, answer)


def _is_fixed(kind: str, request: Sequence[Any]) -> bool:
    """Whether a request has one answer, not one that is drawn."""
    if kind not in SHAPES or not all(isinstance(part, str | dict) for part in request):
        return False
    settings = request[1] if kind == "generate_until" else {}
    return isinstance(settings, dict) and not settings.get("do_sample") and not settings.get("temperature")


def known_answer(kept: TaskAnswers | None, kind: str, request: Any) -> Any:
    """The kept answer to a request of the harness; None where there is none."""
    if kept is None or not _is_fixed(kind, request.args):
        return None
    answer = kept.get(kind, request.args)
    return None if answer is None else SHAPES[kind](answer)


def respond(
    model: Model,
    items: Sequence[Item],
    batch_size: int,
    started: Callable[[int], Advance],
    kept: TaskAnswers | None = None,
) -> int:
    """Let a model answer the requests of items, which hold the answers then; returns how many items were kept ones.

    One request at a time where others in the batch would change a model's numbers.

    Args:
        model: what is asked.
        items: what it is asked.
        batch_size: requests run together.
        started: told the number of requests, once for each kind.
        kept: answers that are there already; new ones are added.
    """
    by_kind: dict[str, list[Any]] = {}
    for request in (request for item in items for request in item.requests):
        request.resps, request.filtered_resps = [], {}
        by_kind.setdefault(request.request_type, []).extend([request] * request.repeats)
    ready = sum(
        all(known_answer(kept, request.request_type, request) is not None for request in item.requests)
        for item in items
    )
    try:
        with _unchanged(model.network):
            seed_everything()
            asked = _Runner(model, batch_size if model.anatomy.batching.is_free else 1, started, kept)
            for kind, requests in by_kind.items():
                for request, answer in zip(requests, getattr(asked, kind)(requests), strict=True):
                    request.resps.append(answer)
    finally:
        if kept is not None:
            kept.write()
    return ready


def chat_writer(model: Model) -> Callable[..., str]:
    """Writes chats as the harness has a model's tokenizer write them."""
    with _unchanged(model.network):
        writer: Callable[..., str] = _Runner(model, 1, lambda total: unreported, None).apply_chat_template
        return writer


@contextmanager
def _unchanged(network: Any) -> Iterator[None]:
    """Give a network its own generation settings back, whatever the harness sets."""
    own = copy.deepcopy(network.generation_config)
    try:
        yield
    finally:
        network.generation_config = own
