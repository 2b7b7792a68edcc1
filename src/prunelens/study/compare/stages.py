"""The stages of a comparison: the dense model writes, all models read, then every compressed model runs free."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.metrics.head import Pair, stream_pairs
from prunelens.metrics.survival import common_prefix
from prunelens.models.model import Model
from prunelens.progress import Advance, Reporter
from prunelens.pruning.pruned import Calibration
from prunelens.pruning.redundancy import Ranking
from prunelens.study.calibration_texts import with_repair_texts
from prunelens.study.candidates import Candidate
from prunelens.study.compare.anchored import measure_anchors, summarise_anchors
from prunelens.study.compare.dense_texts import DenseTexts
from prunelens.study.compare.describe import describe_run
from prunelens.study.compare.drafts import measure_drafts
from prunelens.study.compare.free_running import Reading, free_stats, free_trajectories, in_pieces
from prunelens.study.compare.inside import Inside
from prunelens.study.compare.layer_tables import noise_summary
from prunelens.study.compare.schemas import SCHEMAS, UnsummarisedError
from prunelens.study.compare.settings import Settings
from prunelens.study.compare.summary import summarise
from prunelens.study.compare.tables import (
    Stats,
    alternative_rows,
    continuation_rows,
    prompt_end_rows,
    prompts_table,
    steps_rows,
    survival_table,
)
from prunelens.study.prepare import apply_recipes, rank
from prunelens.study.spool import Spool
from prunelens.study.store import Run, sound
from prunelens.tasks.prompts import Prompt
from prunelens.tracing.forced import Trajectory, forced_states
from prunelens.tracing.free import couple, write_dense, write_free
from prunelens.tracing.generate import Continuation
from prunelens.tracing.prompt_end import prompt_end_stats


class Stages:
    """One comparison in progress; `written` may be taken over from one of the same model, prompts and settings."""

    def __init__(
        self,
        dense: Model,
        candidates: list[Candidate],
        prompts: list[Prompt],
        settings: Settings,
        reporter: Reporter,
        written: DenseTexts | None = None,
    ) -> None:
        self._given = written
        self.dense = dense
        self.candidates = candidates
        self.prompts = prompts
        self.settings = settings
        self.reporter = reporter
        self.spool = Spool(SCHEMAS)
        self.seconds: dict[str, float] = {}
        self.anchors: list[dict[str, Any]] = []

    def run(self, calibration: list[list[int]] | None, reported: Sequence[str] = ()) -> Run:
        """All stages in order: write, rank, read, measure, run free.

        Args:
            calibration: texts of the user's; None for the dense model's own.
            reported: what else than the prompts no repair may be fitted on.

        Raises:
            PrunelensError: recipes that the model cannot take, or no texts to calibrate on.
            UnsummarisedError: the tables are there, but the summary cannot be made.
        """
        with self._clock("dense writes"):
            greedy, sampled = self._dense_texts()
        with self._clock("ranking"):
            texts = calibration or self._own_texts(greedy)
            ranking = self._rank(texts)
        self.written = DenseTexts(greedy, sampled, ranking or (self._given.ranking if self._given else None))
        with self._clock("compressing"):
            recipes = [candidate.recipe for candidate in self.candidates if candidate.recipe]
            asked = [*(prompt.text for prompt in self.prompts), *reported]
            made_on = with_repair_texts(Calibration(texts), recipes, self.dense, calibration, asked, self.reporter)
            apply_recipes(self.candidates, self.dense, made_on, ranking, self.reporter, self.settings.seed)
        trajectories = self._trajectories(greedy, sampled)
        with self._clock("reading"):
            states = self._read(trajectories)
        with self._clock("comparing"):
            readings = self._measure(trajectories, states)
            self._measure_prompt_end(trajectories, states)
        with self._clock("anchors"):
            self.anchors = measure_anchors(
                self.dense, self.prompts, trajectories, states[0], self.settings, self.spool, self.reporter
            )
        inside = self._look_inside(trajectories, states[0])
        for candidate, reading in zip(self.candidates, readings, strict=True):
            self._go_on(candidate, trajectories, states[0], reading, greedy, sampled)
        with self._clock("drafting"):
            drafts, undrafted = measure_drafts(self.dense, self.candidates, self.prompts, self.settings, self.reporter)
        self.spool.add("prompts", [prompts_table(self.prompts)])
        tables = self.spool.tables()
        try:
            return Run(tables, self._info(tables, ranking, inside, drafts, undrafted))
        except Exception as error:
            raise UnsummarisedError(tables, error) from error

    def _info(
        self,
        tables: dict[str, pa.Table],
        ranking: Ranking | None,
        inside: Inside,
        drafts: dict[str, dict[str, Any]],
        undrafted: dict[str, str],
    ) -> dict[str, Any]:
        """The content of run.json."""
        info = describe_run(self.dense, self.candidates, self.prompts, self.settings, ranking, tables, self.seconds)
        info |= {"lens": inside.describe_lens(), "noise": noise_summary(tables["noise"])}
        info |= {"noise_sample": inside.describe_noise_sample()}
        info |= {"anchors": summarise_anchors(self.anchors, tables["anchors"], self.settings.max_new_tokens)}
        info["nulls"] |= {f"layers.{label}": reason for label, reason in inside.misaligned.items()}
        info["nulls"] |= undrafted
        return sound(info | {"summary": summarise(tables, info, drafts)})

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def _write_dense(self) -> tuple[list[Continuation], list[Continuation]]:
        chosen = self.settings
        return write_dense(
            self.dense,
            [prompt.token_ids for prompt in self.prompts],
            chosen.max_new_tokens,
            chosen.temperature,
            chosen.seed,
            chosen.batch_size,
            self.reporter("dense writes", 2 * len(self.prompts) * chosen.max_new_tokens),
        )

    def _dense_texts(self) -> tuple[list[Continuation], list[Continuation]]:
        given = self._given
        greedy, sampled = (given.greedy, given.sampled) if given is not None else self._write_dense()
        for trace, written in (("greedy", greedy), ("sampled", sampled)):
            self.spool.add("continuations", [continuation_rows("dense", trace, self.prompts, written, self.dense)])
        return greedy, sampled

    def _own_texts(self, greedy: list[Continuation]) -> list[list[int]]:
        """The dense model's own texts, which calibrate where nothing else was given."""
        pairs = zip(self.prompts, greedy, strict=True)
        return [[*prompt.token_ids, *continuation.token_ids] for prompt, continuation in pairs]

    def _rank(self, texts: list[list[int]]) -> Ranking | None:
        counted = any(candidate.recipe and candidate.recipe.needs_ranking for candidate in self.candidates)
        if not counted and not self.settings.attribute:
            return None
        if self._given is not None and self._given.ranking is not None:
            return self._given.ranking
        return rank(self.dense, texts, self.reporter)

    def _trajectories(self, greedy: list[Continuation], sampled: list[Continuation]) -> list[Trajectory]:
        return [
            Trajectory(index, trace, prompt.token_ids, tuple(written[index].token_ids), written[index].ended)
            for trace, written in (("greedy", greedy), ("sampled", sampled))
            for index, prompt in enumerate(self.prompts)
        ]

    def _read(self, trajectories: list[Trajectory]) -> list[Tensor]:
        """States of the dense model and then of each candidate, (T, d) each."""
        total = sum(len(trajectory.read_ids) for trajectory in trajectories)
        variants = {candidate.label: candidate.variant(self.dense) for candidate in self.candidates}
        drops = {label: variant.drop for label, variant in variants.items() if variant.model is self.dense}
        advance = self.reporter("dense and dropped models read", total)
        states, *dropped_states = forced_states(self.dense, trajectories, list(drops.values()), advance=advance)
        by_label = dict(zip(drops, dropped_states, strict=True))
        for label, variant in variants.items():
            if label not in drops:
                advance = self.reporter(f"{label} reads", total)
                by_label[label] = forced_states(variant.model, trajectories, advance=advance)[0]
        return [states, *[by_label[label] for label in variants]]

    def _pairs(self, states: Sequence[Tensor]) -> list[Pair]:
        return [
            Pair(own, candidate.variant(self.dense).model.head)
            for own, candidate in zip(states, self.candidates, strict=True)
        ]

    def _measure(self, trajectories: list[Trajectory], states: list[Tensor]) -> list[Reading]:
        """Row statistics of every candidate, written as rows piece by piece; what later stages need is returned."""
        advance = self.reporter("comparing token probabilities", states[0].shape[0])
        readings = [Reading() for _ in self.candidates]
        for rows, texts in in_pieces(trajectories):
            tokens = torch.tensor([token for text in texts for token in text.token_ids])
            found = self._stream(states[0][rows], self._pairs([own[rows] for own in states[1:]]), tokens, advance)
            for lane, (candidate, reading, stats) in enumerate(zip(self.candidates, readings, found, strict=True)):
                self.spool.add("steps", [steps_rows(candidate.label, self.prompts, texts, stats)], lane)
                reading.add(texts, stats)
                if texts[0].trace == "greedy":
                    others = alternative_rows(candidate.label, self.prompts, texts, stats, self.dense)
                    self.spool.add("alternatives", [others], lane)
        return readings

    def _stream(self, states: Tensor, pairs: list[Pair], tokens: Tensor, advance: Advance) -> list[Stats]:
        try:
            return stream_pairs(states, self.dense.head, pairs, tokens, self.settings.temperature, advance)
        except ValueError as error:
            raise PrunelensError(
                f"{error}: one of the models overflows in {self.dense.dtype}; use --dtype float32"
            ) from error

    def _measure_prompt_end(self, trajectories: list[Trajectory], states: list[Tensor]) -> None:
        starts, position = [], 0
        for trajectory in trajectories:
            if trajectory.trace == "greedy":
                starts.append(position)
            position += len(trajectory.token_ids)
        first = [own[starts] for own in states]
        found = prompt_end_stats(
            self.prompts, first[0], self.dense.head, self._pairs(first[1:]), self.settings.temperature
        )
        for candidate, spaces in zip(self.candidates, found, strict=True):
            self.spool.add("prompt_end", prompt_end_rows(candidate.label, self.prompts, spaces))

    def _look_inside(self, trajectories: list[Trajectory], dense_states: Tensor) -> Inside:
        texts = [trajectory for trajectory in trajectories if trajectory.trace == "greedy"]
        inside = Inside(self.dense, self.candidates, self.prompts, texts, self.settings, self.reporter)
        with self._clock("layers"):
            self.spool.add("layers", inside.layers())
        with self._clock("attribution"):
            self.spool.add("attribution", inside.attribution())
        with self._clock("noise floor"):
            self.spool.add("noise", inside.noise(dense_states[: sum(len(text.token_ids) for text in texts)]))
        return inside

    def _go_on(
        self,
        candidate: Candidate,
        trajectories: list[Trajectory],
        dense_states: Tensor,
        reading: Reading,
        greedy: list[Continuation],
        sampled: list[Continuation],
    ) -> None:
        """Free running and couplings of one candidate, from what its reading has shown at each step of each text."""
        half, chosen, each = len(self.prompts), self.settings, reading.survival
        with self._clock("free running"):
            free = self._run_free(candidate, greedy, reading.known)
        with self._clock("comparing"):
            accepted = [stats["acceptance"].numpy() for stats in each[half:]]
            ids = [prompt.token_ids for prompt in self.prompts]
            agreed = couple(ids, sampled, accepted, chosen.max_new_tokens, chosen.seed)
            self._measure_free(candidate, trajectories[:half], dense_states, reading.shared, free, agreed)
            texts = [(dense.token_ids, own.token_ids) for dense, own in zip(greedy, free, strict=True)]
            survival = survival_table(candidate.label, each[half:], each[:half], texts, agreed, chosen.max_new_tokens)
            self.spool.add("survival", [survival])

    def _run_free(self, candidate: Candidate, greedy: list[Continuation], known: Sequence[int]) -> list[Continuation]:
        chosen = self.settings
        ids = [prompt.token_ids for prompt in self.prompts]
        advance = self.reporter(f"{candidate.label} writes", len(ids) * chosen.max_new_tokens)
        with candidate.variant(self.dense).running() as model:
            return write_free(model, ids, greedy, known, chosen.max_new_tokens, chosen.batch_size, advance)

    def _measure_free(
        self,
        candidate: Candidate,
        read: Sequence[Trajectory],
        dense_states: Tensor,
        forced: Sequence[Stats],
        free: list[Continuation],
        agreed: list[list[int]],
    ) -> None:
        def measure(dense: Tensor, own: Tensor, token_ids: Tensor) -> Stats:
            advance = self.reporter(f"comparing {candidate.label} in free running", len(token_ids))
            pair = Pair(own, candidate.variant(self.dense).model.head)
            return self._stream(dense, [pair], token_ids, advance)[0]

        diverged = [
            common_prefix(text.token_ids, own.token_ids, self.settings.max_new_tokens)
            for text, own in zip(read, free, strict=True)
        ]
        stats = free_stats(read, dense_states, forced, free, measure)
        rows = steps_rows(candidate.label, self.prompts, free_trajectories(read, free), stats, diverged=diverged)
        self.spool.add("steps", [rows])
        written = continuation_rows(candidate.label, "greedy", self.prompts, free, self.dense, agreed)
        self.spool.add("continuations", [written])
