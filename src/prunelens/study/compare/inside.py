"""The stages that look inside the models: sublayer by sublayer, the cause of the damage, and the noise floor."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from prunelens.metrics.head import Pair, stream_pairs
from prunelens.models.model import Model
from prunelens.models.opening.loading import DTYPES
from prunelens.models.surgery.variant import Variant
from prunelens.progress import Reporter
from prunelens.study.candidates import Candidate
from prunelens.study.compare.layer_tables import attribution_rows, layer_rows, noise_rows
from prunelens.study.compare.settings import Settings
from prunelens.tasks.prompts import Prompt
from prunelens.tracing.attribution import Attribution
from prunelens.tracing.forced import Trajectory
from prunelens.tracing.layers import even_steps, trace_layers
from prunelens.tracing.noise import BATCH_SHAPE, NoiseSample, in_dtype, noise_sample, sampled_states


class Inside:
    """What is measured inside the models on the dense model's greedy texts.

    Attributes:
        misaligned: why compressed models have no rows, by label.
    """

    def __init__(
        self,
        dense: Model,
        prompts: Sequence[Prompt],
        texts: Sequence[Trajectory],
        settings: Settings,
        reporter: Reporter,
    ) -> None:
        self.dense = dense
        self.prompts = prompts
        self.texts = texts
        self.settings = settings
        self.reporter = reporter
        self.misaligned: dict[str, str] = {}
        self.noise_sample: NoiseSample = noise_sample(self.texts, settings.seed)
        self.steps = even_steps(settings.max_new_tokens, settings.lens_steps) if settings.lens_steps else []

    def aligned(self, candidates: Sequence[Candidate]) -> dict[str, Variant]:
        """Those whose sublayers can be set beside the dense ones, by label; of the others the reason is kept."""
        found = {}
        for candidate in candidates:
            variant = candidate.variant(self.dense)
            problem = variant.aligned_with(self.dense)
            if problem:
                self.misaligned[candidate.label] = problem
            else:
                found[candidate.label] = variant
        return found

    def layers(self, variants: Mapping[str, Variant], of: str = "") -> Iterator[tuple[str, pa.Table]]:
        """L1 and L2 of aligned models, with the label that each table belongs to; `of` ends the stage's name."""
        if not self.steps or not variants:
            return
        drops = {label: variant.drop for label, variant in variants.items() if variant.model is self.dense}
        sampled = sum(step <= len(text.token_ids) for text in self.texts for step in self.steps)
        advance = self.reporter(f"reading every sublayer{of}", sampled)
        lenses, temperature = self.settings.lenses, self.settings.temperature
        rows = trace_layers(self.dense, variants, self.texts, lenses, self.steps, temperature, advance=advance)
        for each in rows:
            yield from layer_rows(each, self.prompts, self.texts, drops)

    def attribution(self, variants: Mapping[str, Variant], of: str = "") -> list[tuple[str, pa.Table]]:
        """D1 of aligned models, as `layers`."""
        chosen = {label: variant for label, variant in variants.items() if self.settings.attributes(label)}
        if not chosen:
            return []
        sweep = Attribution(self.dense, chosen)
        steps = sum(len(text.token_ids) for text in self.texts)
        advance = self.reporter(f"attributing the damage{of}", sweep.num_runs * steps)
        found = sweep.run(self.texts, self.settings.temperature, advance=advance)
        return [(label, attribution_rows(label, parts, self.prompts, self.texts)) for label, parts in found.items()]

    def noise(self, states: Tensor) -> list[pa.Table]:
        """N1 at sampled steps, against the states (T, d) that the dense model had in its own batches and dtype."""
        sample = self.noise_sample
        advance = self.reporter("noise floor", sample.num_read)
        pairs = {BATCH_SHAPE: Pair(sampled_states(self.dense, sample, 1, advance), self.dense.head)}
        dtype = self.settings.noise_dtype
        if dtype is not None:
            other = in_dtype(self.dense, DTYPES[dtype])
            advance = self.reporter(f"noise floor in {dtype}", sample.num_read)
            pairs[dtype] = Pair(sampled_states(other, sample, advance=advance), other.head)
        tokens = torch.tensor([self.texts[index].token_ids[step - 1] for index, step in sample.steps])
        own = states[sample.rows.to(states.device)]
        found = stream_pairs(own, self.dense.head, list(pairs.values()), tokens, self.settings.temperature)
        return [
            noise_rows(against, sample.steps, self.prompts, self.texts, stats)
            for against, stats in zip(pairs, found, strict=True)
        ]

    def describe_noise_sample(self) -> dict[str, int]:
        """What run.json says of the positions at which the noise floor is measured."""
        sample = self.noise_sample
        return {
            "positions": len(sample.steps),
            "of": sample.total,
            "texts": len(sample.texts),
            "of_texts": len(self.texts),
        }

    def describe_lens(self) -> dict[str, Any] | None:
        """What run.json says of the lens."""
        if not self.steps:
            return None
        return {
            "lens": self.settings.lens,
            "steps": self.steps,
            "horizon": self.settings.max_new_tokens,
            "prompts": len(self.prompts),
            "parallel": any(block.layout == "parallel" for block in self.dense.anatomy.blocks),
        }
