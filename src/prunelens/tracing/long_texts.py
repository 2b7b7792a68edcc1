"""Long texts of a model by itself: loops, missing ends, unclosed thinking, and what the dense model makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from prunelens.metrics.head import token_nll
from prunelens.metrics.repetition import distinct_share, is_loop
from prunelens.models.model import Model
from prunelens.models.surgery.variant import Variant
from prunelens.progress import Advance, unreported
from prunelens.tasks.prompts import Prompt
from prunelens.tasks.suite import CORE_LONG, Metric, MetricScores
from prunelens.tracing.forced import Trajectory, forced_states
from prunelens.tracing.generate import Continuation, Greedy, write

OPEN, CLOSE = "<think>", "</think>"

_long = partial(Metric, CORE_LONG, use="long-generation")
NLL = _long("nll_dense", better="lower", decides="nll")
LOOPS = _long("loops", better="lower", decides="loops")
CUT = _long("cut_by_limit", better=None)
DISTINCT = _long("distinct_3", better=None)
LENGTH = _long("length", better=None)
UNCLOSED = _long("unclosed_thinking", better="lower")


@dataclass(frozen=True)
class LongText:
    """A text that a model wrote by itself, greedily.

    Attributes:
        prompt: what it answers.
        token_ids: its tokens, EOS included where it was reached.
        text: its text.
        ended: whether it ended by itself; otherwise the limit cut it.
        nll_dense: nats per token that the dense model needs for it (its own tokens, after the prompt).
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    text: str
    ended: bool
    nll_dense: float


def write_long(
    dense: Model,
    variant: Variant,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int,
    advance: Advance = unreported,
) -> list[LongText]:
    """Let a model answer each prompt greedily, and let the dense model read what it wrote.

    Args:
        dense: the dense model, which reads.
        variant: the model that writes; the dense model itself is `Variant(dense)`.
        prompts: what is asked.
        max_new_tokens: where a text is cut.
        batch_size: texts decoded together.
        advance: called with the number of row-steps decoded.
    """
    with variant.running() as model:
        rules = [Greedy() for _ in prompts]
        written = write(model, [prompt.token_ids for prompt in prompts], rules, max_new_tokens, batch_size, advance)
    costs = _read_by_dense(dense, prompts, written)
    return [
        LongText(prompt, tuple(own.token_ids), _decoded(dense, own), own.ended, float(cost.mean()))
        for prompt, own, cost in zip(prompts, written, costs, strict=True)
    ]


def _decoded(dense: Model, own: Continuation) -> str:
    text: str = dense.tokenizer.decode(own.token_ids[:-1] if own.ended else own.token_ids)
    return text


def _read_by_dense(
    dense: Model, prompts: Sequence[Prompt], written: Sequence[Continuation]
) -> tuple[Float64[Tensor, " _"], ...]:
    """-log p of each token of each text, nats."""
    trajectories = [
        Trajectory(index, "free", prompt.token_ids, tuple(own.token_ids), own.ended)
        for index, (prompt, own) in enumerate(zip(prompts, written, strict=True))
    ]
    states = forced_states(dense, trajectories)[0]
    tokens = torch.tensor([token for own in written for token in own.token_ids])
    return token_nll(states, dense.head, tokens).split([len(own.token_ids) for own in written])


def score_long(dense: Model, texts: Sequence[LongText]) -> list[MetricScores]:
    """The metrics of core_long on each text; unclosed thinking only where the chat template knows thinking."""
    values: dict[Metric, list[float | None]] = {
        NLL: [text.nll_dense for text in texts],
        LOOPS: [float(is_loop(text.token_ids)) for text in texts],
        CUT: [float(not text.ended) for text in texts],
        DISTINCT: [distinct_share(text.token_ids, 3) for text in texts],
        LENGTH: [float(len(text.token_ids)) for text in texts],
    }
    if OPEN in str(getattr(dense.tokenizer, "chat_template", None) or ""):
        values[UNCLOSED] = [float(_thinks_on(dense, text)) for text in texts]
    keys = [text.prompt.prompt_id for text in texts]
    return [
        MetricScores(metric, {key: value for key, value in zip(keys, found, strict=True) if value is not None})
        for metric, found in values.items()
    ]


def _thinks_on(dense: Model, text: LongText) -> bool:
    """Whether thinking was begun, by the prompt or by the model, and never closed."""
    whole: str = dense.tokenizer.decode(text.prompt.token_ids) + text.text
    return whole.rfind(OPEN) > whole.rfind(CLOSE)
