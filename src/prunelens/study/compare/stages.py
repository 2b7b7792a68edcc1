"""The stages of a comparison: the dense model writes and reads, then every compressed model has its turn."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from torch import Tensor

from prunelens.models.model import Model
from prunelens.progress import Reporter
from prunelens.pruning.pruned import Calibration
from prunelens.pruning.redundancy import Ranking
from prunelens.study.calibration_texts import with_repair_texts
from prunelens.study.candidates import Candidate
from prunelens.study.compare.anchored import measure_anchors, summarise_anchors
from prunelens.study.compare.dense_texts import DenseTexts
from prunelens.study.compare.describe import describe_run
from prunelens.study.compare.inside import Inside
from prunelens.study.compare.layer_tables import noise_summary
from prunelens.study.compare.schemas import SCHEMAS, UnsummarisedError
from prunelens.study.compare.settings import Settings
from prunelens.study.compare.summary import summarise
from prunelens.study.compare.tables import continuation_rows, prompts_table
from prunelens.study.compare.turns import Bench, Clock, Told, Turns
from prunelens.study.prepare import apply_recipes, rank
from prunelens.study.spool import Spool
from prunelens.study.store import Run, sound
from prunelens.tasks.prompts import Prompt
from prunelens.tracing.forced import Trajectory, forced_states
from prunelens.tracing.free import write_dense
from prunelens.tracing.generate import Continuation


class Stages:
    """One comparison in progress; `written` may be taken over from one of the same model, prompts and settings.

    Compressed models on the dense model's own weights go together. Every other one is made or opened when its turn
    comes, and let go when the next one's does, so that two models are held at most.
    """

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
        self._clock = Clock()
        self.anchors: list[dict[str, Any]] = []

    def run(self, calibration: list[list[int]] | None, reported: Sequence[str] = ()) -> Run:
        """All stages in order: write, rank, read, and the turns of the compressed models.

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
        together = [candidate for candidate in self.candidates if candidate.shares_weights(self.dense)]
        self._make(together, made_on, ranking)
        trajectories = self._trajectories(greedy, sampled)
        states, *dropped = self._read(trajectories, together)
        inside = Inside(self.dense, self.prompts, trajectories[: len(self.prompts)], self.settings, self.reporter)
        self._vary_dense(trajectories, states, inside)
        bench = Bench(self.dense, self.prompts, self.settings, self.reporter, self.spool, self._clock)
        labels = [candidate.label for candidate in self.candidates]
        turns = Turns(bench, inside, labels, self.written, trajectories, states)
        if together:
            turns.take(together, dropped)
        del dropped
        self._take_alone(turns, made_on, ranking)
        self.spool.add("prompts", [prompts_table(self.prompts)])
        tables = self.spool.tables()
        try:
            return Run(tables, self._info(tables, ranking, inside, turns.told))
        except Exception as error:
            raise UnsummarisedError(tables, error) from error

    def _info(self, tables: dict[str, pa.Table], ranking: Ranking | None, inside: Inside, told: Told) -> dict[str, Any]:
        """The content of run.json."""
        described = [told.described[candidate.label] for candidate in self.candidates]
        seconds = self._clock.seconds
        info = describe_run(self.dense, described, self.prompts, self.settings, ranking, tables, seconds)
        info |= {"lens": inside.describe_lens(), "noise": noise_summary(tables["noise"])}
        info |= {"noise_sample": inside.describe_noise_sample()}
        info |= {"anchors": summarise_anchors(self.anchors, tables["anchors"], self.settings.max_new_tokens)}
        info["nulls"] |= {f"layers.{label}": reason for label, reason in inside.misaligned.items()}
        info["nulls"] |= told.undrafted
        return sound(info | {"summary": summarise(tables, info, told.drafts)})

    def _vary_dense(self, trajectories: list[Trajectory], states: Tensor, inside: Inside) -> None:
        """What is measured of the dense model itself: the noise floor and the anchors."""
        with self._clock("noise floor"):
            self.spool.add("noise", inside.noise(states))
        with self._clock("anchors"):
            self.anchors = measure_anchors(
                self.dense, self.prompts, trajectories, states, self.settings, self.spool, self.reporter
            )

    def _take_alone(self, turns: Turns, made_on: Calibration, ranking: Ranking | None) -> None:
        """The turns of all with weights of their own, of which two are never held at once."""
        alone = [candidate for candidate in self.candidates if not candidate.shares_weights(self.dense)]
        for place, candidate in enumerate(alone):
            if place:
                alone[place - 1].let_go()
            self._make([candidate], made_on, ranking)
            states = self._read_alone(turns.trajectories, candidate)
            turns.take([candidate], [states], f" of {candidate.label}")

    def _make(self, candidates: Sequence[Candidate], made_on: Calibration, ranking: Ranking | None) -> None:
        """Apply recipes, and open what was let go."""
        with self._clock("compressing"):
            for candidate in candidates:
                candidate.open(self.dense)
            apply_recipes(candidates, self.dense, made_on, ranking, self.reporter, self.settings.seed)

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
            rows = continuation_rows("dense", trace, self.prompts, written, self.dense)
            self.spool.add("continuations", [rows], lane=0)
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

    def _read(self, trajectories: list[Trajectory], together: Sequence[Candidate]) -> list[Tensor]:
        """States of the dense model and then of each candidate that runs on its weights, (T, d) each."""
        drops = [candidate.variant(self.dense).drop for candidate in together]
        advance = self.reporter("dense and dropped models read", _num_read(trajectories))
        with self._clock("reading"):
            return forced_states(self.dense, trajectories, drops, advance=advance)

    def _read_alone(self, trajectories: list[Trajectory], candidate: Candidate) -> Tensor:
        """States (T, d) of a candidate with weights of its own."""
        advance = self.reporter(f"{candidate.label} reads", _num_read(trajectories))
        with self._clock("reading"):
            return forced_states(candidate.variant(self.dense).model, trajectories, advance=advance)[0]


def _num_read(trajectories: Sequence[Trajectory]) -> int:
    return sum(len(trajectory.read_ids) for trajectory in trajectories)
