"""The metrics of core_long: one number a prompt, the mean over its texts, judged beside the dense model's texts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Float64

from prunelens.metrics.typicality import atypical
from prunelens.tasks.suite import CORE_LONG, Metric, MetricScores
from prunelens.tracing.long_texts import LongText

_long = partial(Metric, CORE_LONG, use="long-generation")
EXCESS = _long("excess_nll", better="lower", decides="nll")
ATYPICAL = _long("atypical", better="lower")
LOOPS = _long("loops", better="lower", decides="loops")
NLL = _long("nll_dense", better="lower")
CUT = _long("cut_by_limit", better=None)
DISTINCT = _long("distinct_3", better=None)
LENGTH = _long("length", better=None)
UNCLOSED = _long("unclosed_thinking", better="lower")

VALUES: dict[Metric, Callable[[LongText], float | None]] = {
    EXCESS: lambda text: text.excess_nll,
    ATYPICAL: lambda text: text.atypical,
    LOOPS: lambda text: text.loops,
    NLL: lambda text: text.nll_dense,
    CUT: lambda text: not text.ended,
    DISTINCT: lambda text: text.distinct,
    LENGTH: lambda text: len(text.token_ids),
    UNCLOSED: lambda text: text.unclosed,
}
"""What each metric takes of a text; None where it says nothing of it."""


def score_long(texts: Sequence[LongText]) -> list[MetricScores]:
    """The metrics of core_long for each prompt; several texts of a prompt are one item, their mean.

    Args:
        texts: what one model wrote, as `held_against` gives them.
    """
    found = [MetricScores(metric, _by_prompt(texts, value)) for metric, value in VALUES.items()]
    return [scored for scored in found if scored.values or scored.metric != UNCLOSED]


def held_against(reference: Sequence[LongText], texts: Sequence[LongText]) -> list[LongText]:
    """The texts, each with whether it is atypical of those of the reference that were drawn the same way (V9)."""
    found = list(texts)
    for sampling in dict.fromkeys(text.sampling for text in texts):
        places = [place for place, text in enumerate(texts) if text.sampling == sampling]
        own, others = [texts[place] for place in places], [text for text in reference if text.sampling == sampling]
        verdicts = atypical(_costs(own), _owners(own), _costs(others), _owners(others))
        for place, text, verdict in zip(places, own, verdicts, strict=True):
            found[place] = replace(text, atypical=verdict)
    return found


def _costs(texts: Sequence[LongText]) -> Float64[np.ndarray, " _"]:
    return np.array([text.nll_dense for text in texts])


def _owners(texts: Sequence[LongText]) -> list[str]:
    return [text.prompt_id for text in texts]


def _by_prompt(texts: Sequence[LongText], value: Callable[[LongText], float | None]) -> dict[str, float | None]:
    """The mean of a prompt's values; a prompt without any is left out."""
    own: dict[str, list[float]] = {}
    for text in texts:
        found = value(text)
        if found is not None:
            own.setdefault(text.prompt_id, []).append(float(found))
    return {prompt: sum(values) / len(values) for prompt, values in own.items()}
