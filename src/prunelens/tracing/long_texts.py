"""Long texts that a model draws by itself, several a prompt, and what the dense model makes of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from prunelens.metrics.head import token_costs
from prunelens.metrics.repetition import distinct_share, is_loop
from prunelens.models.model import Model
from prunelens.models.surgery.variant import Variant
from prunelens.progress import Advance, unreported
from prunelens.tasks.prompts import Prompt
from prunelens.tracing.forced import Trajectory, forced_states
from prunelens.tracing.generate import Continuation, uniforms, write
from prunelens.tracing.sampling import Sampling

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class LongPlan:
    """Which texts are written.

    Attributes:
        samplings: ways to draw texts.
        samples: texts of each prompt in each way.
        max_new_tokens: where a text is cut.
        seed: of the numbers that choose tokens.
        series: texts of the same plan in another series share no number: the dense model beside itself.
    """

    samplings: tuple[Sampling, ...] = (Sampling(),)
    samples: int = 1
    max_new_tokens: int = 96
    seed: int = 0
    series: str = "own"

    @property
    def per_prompt(self) -> int:
        """Texts of each prompt."""
        return len(self.samplings) * self.samples

    @property
    def null(self) -> "LongPlan":
        """The same with other numbers."""
        return replace(self, series="null")

    def numbers(self, sampling: Sampling, prompt: Prompt, repeat: int) -> np.ndarray:
        """(max_new_tokens,) numbers in [0, 1) of one text: the same for every model."""
        purpose = f"long texts, {sampling.name}, {self.series}"
        return uniforms(self.seed, purpose, prompt.token_ids, repeat, self.max_new_tokens)


@dataclass(frozen=True)
class LongText:
    """A text that a model drew, and what the dense model needs for it. All of it is text and numbers, to be stored.

    Attributes:
        prompt_id, kind, prompt: what it answers.
        sampling: how it was drawn, the name of a `Sampling`.
        repeat: which of the texts that were drawn so.
        token_ids: its tokens, EOS included where it was reached.
        text: its text.
        ended: whether it ended by itself; otherwise the limit cut it.
        nll_dense: nats per token that the dense model needs for it (its own tokens, after the prompt).
        entropy_dense: nats per token that the dense model would need, on average, for its own tokens in their places.
        unclosed: whether thinking was begun and not closed; None where the chat template knows no thinking.
        atypical: whether it was found atypical of the dense model's texts (V9); None where that was not asked.
    """

    prompt_id: str
    kind: str
    prompt: str
    sampling: str
    repeat: int
    token_ids: tuple[int, ...]
    text: str
    ended: bool
    nll_dense: float
    entropy_dense: float
    unclosed: bool | None = None
    atypical: bool | None = None

    @property
    def excess_nll(self) -> float:
        """Nats per token beyond what the dense model expects (V3)."""
        return self.nll_dense - self.entropy_dense

    @property
    def loops(self) -> bool:
        """Whether it ends in a loop (V4)."""
        return is_loop(self.token_ids)

    @property
    def distinct(self) -> float | None:
        """Distinct 3-grams over all 3-grams; None for a text of fewer tokens."""
        return distinct_share(self.token_ids, 3)


@dataclass(frozen=True)
class DenseLongTexts:
    """The dense model's texts: `own`, and `null`, drawn once more with other numbers."""

    own: list[LongText]
    null: list[LongText]

    @property
    def both(self) -> list[LongText]:
        """What other texts are held against."""
        return [*self.own, *self.null]


def write_long(
    dense: Model,
    variant: Variant,
    prompts: Sequence[Prompt],
    plan: LongPlan,
    batch_size: int,
    advance: Advance = unreported,
) -> list[LongText]:
    """Let a model draw the texts of a plan, and let the dense model read what it wrote.

    The numbers that choose tokens depend on the plan and the prompt alone, so that two models write the same text as
    long as they agree.

    Args:
        dense: the dense model, which reads.
        variant: the model that writes; the dense model itself is `Variant(dense)`.
        prompts: what is asked.
        plan: which texts.
        batch_size: texts decoded together.
        advance: called with the number of row-steps decoded.

    Returns:
        The texts of the first prompt, of the second, …: for each prompt by sampling, then by repeat.
    """
    asked = [
        (prompt, sampling, repeat)
        for prompt in prompts
        for sampling in plan.samplings
        for repeat in range(plan.samples)
    ]
    rules = [
        sampling.rule(plan.numbers(sampling, prompt, repeat), prompt.token_ids) for prompt, sampling, repeat in asked
    ]
    rows = [prompt.token_ids for prompt, _, _ in asked]
    with variant.running() as model:
        written = write(model, rows, rules, plan.max_new_tokens, batch_size, advance)
    costs = _read_by_dense(dense, rows, written)
    return [
        _text(dense, prompt, sampling, repeat, own, *cost)
        for (prompt, sampling, repeat), own, cost in zip(asked, written, costs, strict=True)
    ]


def _text(
    dense: Model, prompt: Prompt, sampling: Sampling, repeat: int, own: Continuation, cost: Tensor, entropy: Tensor
) -> LongText:
    text: str = dense.tokenizer.decode(own.token_ids[:-1] if own.ended else own.token_ids)
    return LongText(
        prompt.prompt_id,
        prompt.kind,
        prompt.text,
        sampling.name,
        repeat,
        tuple(own.token_ids),
        text,
        own.ended,
        float(cost.mean()),
        float(entropy.mean()),
        _thinks_on(dense, prompt, text),
    )


def _read_by_dense(
    dense: Model, prompts: Sequence[Sequence[int]], written: Sequence[Continuation]
) -> list[tuple[Float64[Tensor, " _"], Float64[Tensor, " _"]]]:
    """-log p and entropy at each token of each text, nats."""
    trajectories = [
        Trajectory(index, "free", tuple(prompt), tuple(own.token_ids), own.ended)
        for index, (prompt, own) in enumerate(zip(prompts, written, strict=True))
    ]
    states = forced_states(dense, trajectories)[0]
    tokens = torch.tensor([token for own in written for token in own.token_ids])
    lengths = [len(own.token_ids) for own in written]
    costs, entropies = token_costs(states, dense.head, tokens)
    return list(zip(costs.split(lengths), entropies.split(lengths), strict=True))


def _thinks_on(dense: Model, prompt: Prompt, text: str) -> bool | None:
    """Whether thinking was begun, by the prompt or by the model, and never closed."""
    if OPEN not in str(getattr(dense.tokenizer, "chat_template", None) or ""):
        return None
    whole: str = dense.tokenizer.decode(prompt.token_ids) + text
    return whole.rfind(OPEN) > whole.rfind(CLOSE)
