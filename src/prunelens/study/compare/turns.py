"""The turn of one compressed model, or of several on the dense model's weights: measured, looked into, run free.

When it ends, nothing of the model is needed any more: its rows are in the spool, and what run.json says of it is told.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.metrics.head import Pair, stream_pairs
from prunelens.metrics.survival import common_prefix
from prunelens.models.model import Model
from prunelens.progress import Advance, Reporter
from prunelens.study.candidates import Candidate
from prunelens.study.compare.dense_texts import DenseTexts
from prunelens.study.compare.describe import Described, described
from prunelens.study.compare.drafts import measure_drafts
from prunelens.study.compare.free_running import Reading, free_stats, free_trajectories, in_pieces
from prunelens.study.compare.inside import Inside
from prunelens.study.compare.settings import Settings
from prunelens.study.compare.tables import (
    Stats,
    alternative_rows,
    continuation_rows,
    prompt_end_rows,
    steps_rows,
    survival_table,
)
from prunelens.study.spool import Spool
from prunelens.tasks.prompts import Prompt
from prunelens.tracing.forced import Trajectory
from prunelens.tracing.free import couple, write_free
from prunelens.tracing.generate import Continuation
from prunelens.tracing.prompt_end import prompt_end_stats


@dataclass
class Clock:
    """Adds up the seconds of each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the body."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Bench:
    """What every turn works with."""

    dense: Model
    prompts: list[Prompt]
    settings: Settings
    reporter: Reporter
    spool: Spool
    clock: Clock


@dataclass
class Told:
    """What run.json says of the compressed models, by label.

    Attributes:
        described: what each is and how it was made.
        drafts: what was measured of it as a draft.
        undrafted: reasons why a draft was not measured, by the name of what is missing.
    """

    described: dict[str, Described] = field(default_factory=dict)
    drafts: dict[str, dict[str, Any]] = field(default_factory=dict)
    undrafted: dict[str, str] = field(default_factory=dict)


class Turns:
    """Takes compressed models in turn.

    Args:
        bench: what to work with.
        inside: looks into the models.
        labels: of all compressed models, in the order of their rows.
        texts: what the dense model wrote.
        trajectories: the same, read: all greedy texts and then all sampled ones.
        states: of the dense model at every step, (T, d).
    """

    def __init__(
        self,
        bench: Bench,
        inside: Inside,
        labels: Sequence[str],
        texts: DenseTexts,
        trajectories: list[Trajectory],
        states: Tensor,
    ) -> None:
        self.bench, self.inside, self.texts = bench, inside, texts
        self.trajectories, self.states = trajectories, states
        self.told = Told()
        self._lanes = {"dense": 0} | {label: lane for lane, label in enumerate(labels, 1)}

    def take(self, candidates: Sequence[Candidate], states: Sequence[Tensor], of: str = "") -> None:
        """Everything that is measured of compressed models, all of which are held meanwhile.

        Args:
            candidates: the compressed models.
            states: of each at every step, (T, d).
            of: the end of the names of the stages, which tells the turns apart.
        """
        bench = self.bench
        with bench.clock("comparing"):
            readings = self._measure(candidates, states, of)
            self._measure_prompt_end(candidates, states)
        self._look_inside(candidates, of)
        for candidate, reading in zip(candidates, readings, strict=True):
            self._go_on(candidate, reading)
        with bench.clock("drafting"):
            found, nulls = measure_drafts(bench.dense, candidates, bench.prompts, bench.settings, bench.reporter)
        self.told.drafts |= found
        self.told.undrafted |= nulls
        self.told.described |= {candidate.label: described(candidate, bench.dense) for candidate in candidates}

    def _pairs(self, candidates: Sequence[Candidate], states: Sequence[Tensor]) -> list[Pair]:
        return [
            Pair(own, candidate.variant(self.bench.dense).model.head)
            for own, candidate in zip(states, candidates, strict=True)
        ]

    def _measure(self, candidates: Sequence[Candidate], states: Sequence[Tensor], of: str) -> list[Reading]:
        """Row statistics of every candidate, written as rows piece by piece; what later stages need is returned."""
        bench, prompts = self.bench, self.bench.prompts
        advance = bench.reporter(f"comparing token probabilities{of}", self.states.shape[0])
        readings = [Reading() for _ in candidates]
        for rows, texts in in_pieces(self.trajectories):
            tokens = torch.tensor([token for text in texts for token in text.token_ids])
            pairs = self._pairs(candidates, [own[rows] for own in states])
            found = self._stream(self.states[rows], pairs, tokens, advance)
            for candidate, reading, stats in zip(candidates, readings, found, strict=True):
                lane = self._lanes[candidate.label]
                bench.spool.add("steps", [steps_rows(candidate.label, prompts, texts, stats)], lane)
                reading.add(texts, stats)
                if texts[0].trace == "greedy":
                    others = alternative_rows(candidate.label, prompts, texts, stats, bench.dense)
                    bench.spool.add("alternatives", [others], lane)
        return readings

    def _stream(self, states: Tensor, pairs: list[Pair], tokens: Tensor, advance: Advance) -> list[Stats]:
        dense = self.bench.dense
        try:
            return stream_pairs(states, dense.head, pairs, tokens, self.bench.settings.temperature, advance)
        except ValueError as error:
            raise PrunelensError(
                f"{error}: one of the models overflows in {dense.dtype}; use --dtype float32"
            ) from error

    def _measure_prompt_end(self, candidates: Sequence[Candidate], states: Sequence[Tensor]) -> None:
        bench, starts, position = self.bench, list[int](), 0
        for trajectory in self.trajectories:
            if trajectory.trace == "greedy":
                starts.append(position)
            position += len(trajectory.token_ids)
        pairs = self._pairs(candidates, [own[starts] for own in states])
        temperature = bench.settings.temperature
        found = prompt_end_stats(bench.prompts, self.states[starts], bench.dense.head, pairs, temperature)
        for candidate, spaces in zip(candidates, found, strict=True):
            rows = prompt_end_rows(candidate.label, bench.prompts, spaces)
            bench.spool.add("prompt_end", rows, self._lanes[candidate.label])

    def _look_inside(self, candidates: Sequence[Candidate], of: str) -> None:
        bench, variants = self.bench, self.inside.aligned(candidates)
        with bench.clock("layers"):
            for label, table in self.inside.layers(variants, of):
                bench.spool.add("layers", [table], self._lanes[label])
        with bench.clock("attribution"):
            for label, table in self.inside.attribution(variants, of):
                bench.spool.add("attribution", [table], self._lanes[label])

    def _go_on(self, candidate: Candidate, reading: Reading) -> None:
        """Free running and couplings of one candidate, from what its reading has shown at each step of each text."""
        bench, greedy, each = self.bench, self.texts.greedy, reading.survival
        half, horizon = len(bench.prompts), bench.settings.max_new_tokens
        with bench.clock("free running"):
            free = self._run_free(candidate, reading.known)
        with bench.clock("comparing"):
            accepted = [stats["acceptance"].numpy() for stats in each[half:]]
            ids = [prompt.token_ids for prompt in bench.prompts]
            agreed = couple(ids, self.texts.sampled, accepted, horizon, bench.settings.seed)
            self._measure_free(candidate, reading.shared, free, agreed)
            texts = [(dense.token_ids, own.token_ids) for dense, own in zip(greedy, free, strict=True)]
            survival = survival_table(candidate.label, each[half:], each[:half], texts, agreed, horizon)
            bench.spool.add("survival", [survival], self._lanes[candidate.label])

    def _run_free(self, candidate: Candidate, known: Sequence[int]) -> list[Continuation]:
        bench, chosen = self.bench, self.bench.settings
        ids = [prompt.token_ids for prompt in bench.prompts]
        advance = bench.reporter(f"{candidate.label} writes", len(ids) * chosen.max_new_tokens)
        with candidate.variant(bench.dense).running() as model:
            return write_free(model, ids, self.texts.greedy, known, chosen.max_new_tokens, chosen.batch_size, advance)

    def _measure_free(
        self, candidate: Candidate, forced: Sequence[Stats], free: list[Continuation], agreed: list[list[int]]
    ) -> None:
        bench, read = self.bench, self.trajectories[: len(self.bench.prompts)]
        label, lane = candidate.label, self._lanes[candidate.label]

        def measure(dense: Tensor, own: Tensor, token_ids: Tensor) -> Stats:
            advance = bench.reporter(f"comparing {label} in free running", len(token_ids))
            return self._stream(dense, self._pairs([candidate], [own]), token_ids, advance)[0]

        diverged = [
            common_prefix(text.token_ids, own.token_ids, bench.settings.max_new_tokens)
            for text, own in zip(read, free, strict=True)
        ]
        stats = free_stats(read, self.states, forced, free, measure)
        rows = steps_rows(label, bench.prompts, free_trajectories(read, free), stats, diverged=diverged)
        bench.spool.add("steps", [rows], len(self._lanes) + lane)  # behind the read texts of all
        written = continuation_rows(label, "greedy", bench.prompts, free, bench.dense, agreed)
        bench.spool.add("continuations", [written], lane)
