"""How texts are drawn: from the model's whole distribution, and by the checkpoint's own generation settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import transformers

from prunelens.errors import PrunelensError, shown
from prunelens.models.model import Model
from prunelens.tracing.generate import Rule, Sampled, Warped

PLAIN, OWN = "plain", "own"

Processor = Any
"""A logits processor of transformers: (1, T) token ids and (1, V) logits to (1, V) logits."""

PROCESSORS: dict[str, tuple[str, float | None]] = {
    "repetition_penalty": ("RepetitionPenaltyLogitsProcessor", 1.0),
    "no_repeat_ngram_size": ("NoRepeatNGramLogitsProcessor", 0),
    "temperature": ("TemperatureLogitsWarper", 1.0),
    "top_k": ("TopKLogitsWarper", 0),
    "top_p": ("TopPLogitsWarper", 1.0),
    "min_p": ("MinPLogitsWarper", 0),
    "typical_p": ("TypicalLogitsWarper", 1.0),
    "epsilon_cutoff": ("EpsilonLogitsWarper", 0),
    "eta_cutoff": ("EtaLogitsWarper", 0),
}
"""Settings that are followed, in transformers' order: the class that applies each, and the value without effect."""


@dataclass(frozen=True)
class Sampling:
    """One way to draw texts: `plain` at T = 1 from the whole vocabulary, or `own` with a checkpoint's settings."""

    name: str = PLAIN
    settings: Mapping[str, Any] = field(default_factory=dict)

    def rule(self, uniforms: np.ndarray, prompt: Sequence[int]) -> Rule:
        """The rule of one row that draws with the numbers in [0, 1) given for its steps."""
        if not self.settings:
            return Sampled(uniforms, 1.0)
        return Warped(uniforms, [_processor(name, value) for name, value in self.settings.items()], prompt)


def samplings(model: Model) -> list[Sampling]:
    """`plain`, and `own` where the checkpoint's generation settings name anything that changes what is drawn.

    Raises:
        PrunelensError: a setting of the checkpoint that transformers refuses.
    """
    config = getattr(model.network, "generation_config", None)
    named = {name: getattr(config, name, None) for name in PROCESSORS}
    settings = {name: value for name, value in named.items() if value is not None and value != PROCESSORS[name][1]}
    for name, value in settings.items():
        _processor(name, value)
    return [Sampling(), *([Sampling(OWN, settings)] if settings else [])]


def _processor(name: str, value: Any) -> Processor:
    try:
        return getattr(transformers, PROCESSORS[name][0])(value)
    except (TypeError, ValueError) as error:
        raise PrunelensError(
            f"cannot draw texts with {name} {shown(value)} of the checkpoint's generation_config.json "
            f"({shown(str(error))}); correct it there, or take it out"
        ) from None
