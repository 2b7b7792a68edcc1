"""The harness's own model class around a network in memory; imported only where tasks are run."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from prunelens.models.model import Model
from prunelens.models.texts import told_ending, without_ending
from prunelens.progress import Advance, unreported

SEED = 0


class _Runner(HFLM):
    """Runs a network as it is and tells how many requests are done."""

    def __init__(self, model: Model, batch_size: int, started: Callable[[int], Advance]) -> None:
        self._started = started
        self._cached = model.anatomy.manner.cached
        self._advance: Advance = unreported
        super().__init__(
            pretrained=model.network, tokenizer=copy.deepcopy(model.tokenizer), batch_size=batch_size, backend="causal"
        )

        self._ending = told_ending(model)

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
        return self._counted(super().loglikelihood, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Greedy texts up to a stop."""
        return self._counted(super().generate_until, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        """Log-likelihoods of whole texts."""
        return self._counted(super().loglikelihood_rolling, requests)

    def _counted(self, run: Callable[..., Any], requests: list[Any]) -> Any:
        done, tell = 0, self._started(len(requests))

        def advance(count: int) -> None:
            nonlocal done
            count = min(count, len(requests) - done)
            done += count
            tell(count)

        self._advance = advance
        found = run(requests, disable_tqdm=True)
        advance(len(requests) - done)
        return found

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


class _Unaggregated(dict[str, Callable[[list[Any]], float]]):
    """An aggregation for every metric that never fails: scores are made from the samples, after all work is kept."""

    def __missing__(self, metric: str) -> Callable[[list[Any]], float]:
        return lambda items: 0.0


def evaluate(
    model: Model,
    manager: TaskManager,
    tasks: dict[str, Any],
    items: dict[str, list[int]],
    batch_size: int,
    chat_template: bool,
    allow_code: bool,
    started: Callable[[int], Advance],
) -> dict[str, list[dict[str, Any]]]:
    """The harness's samples of each task, those of the given items in their order.

    One request at a time where others in the batch would change a model's numbers.

    Args:
        model: what is asked.
        manager: where the tasks come from.
        tasks: the loaded tasks by name.
        items: for each task which of its items.
        batch_size: requests run together.
        chat_template: apply the tokenizer's chat template.
        allow_code: run what the model writes, where a task does so.
        started: told the number of requests, once for each kind.
    """
    batch_size = batch_size if model.anatomy.batching.is_free else 1
    network = model.network
    own = copy.deepcopy(network.generation_config)
    try:
        for task in tasks.values():
            task.aggregation = _Unaggregated
        with patch.object(evaluator, "get_git_commit_hash", return_value=None):  # it would run git in this folder
            found = evaluator.simple_evaluate(
                model=_Runner(model, batch_size, started),
                tasks=list(tasks.values()),
                task_manager=manager,
                samples=dict(items),
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=chat_template,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
                confirm_run_unsafe_code=allow_code,
            )
    finally:
        network.generation_config = own
        for task in tasks.values():
            vars(task).pop("aggregation", None)
    samples: dict[str, list[dict[str, Any]]] = found["samples"]
    return samples
