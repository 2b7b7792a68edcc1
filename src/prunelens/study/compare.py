"""Compare a dense model with compressed ones: write, read, measure, and collect the tables of a run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import torch
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.models.loading import Model, load
from prunelens.pruning.calibration import read_calibration
from prunelens.pruning.importance import Ranking, rank_redundancy
from prunelens.spaces.head import Pair, stream_pairs
from prunelens.spaces.survival import common_prefix
from prunelens.study.candidates import Candidate, Compressible, open_candidates, parse_candidates, resolve_candidates
from prunelens.study.result import Comparison
from prunelens.study.store import FORMAT, FORMAT_VERSION, SCHEMAS, STAT_COLUMNS, Run
from prunelens.study.summary import summarise
from prunelens.study.tables import (
    Stats,
    alternative_rows,
    concat,
    continuation_rows,
    prompt_end_rows,
    prompts_table,
    steps_rows,
    survival_table,
)
from prunelens.tasks.prompts import CORE, Prompt, PromptText, encode
from prunelens.tasks.prompts import prompts as read_prompts
from prunelens.tracing.forced import Trajectory, forced_states
from prunelens.tracing.free import Draw, write_coupled, write_dense
from prunelens.tracing.generate import Continuation
from prunelens.tracing.prompt_end import prompt_end_stats

Advance = Callable[[int], None]


@runtime_checkable
class Reporter(Protocol):
    """Shows progress: called with a stage and its total, gives a function to call with what was finished."""

    def __call__(self, stage: str, total: int) -> Advance:
        """Begin a stage."""
        ...


def silent(stage: str, total: int) -> Advance:
    """No progress display."""
    return lambda done: None


@dataclass(frozen=True)
class Settings:
    """How models are compared; stored in run.json."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 32
    chat_template: bool = True
    calibration: str | None = None

    def check(self) -> None:
        """Refuse settings without meaning.

        Raises:
            PrunelensError: as said.
        """
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise PrunelensError("expected --max-new-tokens and --batch-size of at least 1")
        if not 0.01 <= self.temperature <= 100:
            raise PrunelensError(f"expected a temperature from 0.01 to 100, found {self.temperature}")


def compare(
    dense: str | Path | Model,
    *compressed: Compressible,
    prompts: str | Path | Sequence[PromptText] = CORE,
    reporter: Reporter = silent,
    **settings: Any,
) -> Comparison:
    """Compare compressed models with a dense one on its own texts.

    Args:
        dense: an open model, or what `load` takes.
        compressed: recipes (`drop-attention:8`), models, or what `load` takes.
        prompts: `core`, a path, or prompts read before.
        reporter: progress display.
        settings: fields of `Settings`.

    Raises:
        PrunelensError: bad input, before anything is computed.
    """
    chosen = check_inputs(compressed, settings)
    texts = read_prompts(prompts) if isinstance(prompts, str | Path) else list(prompts)
    if not texts:
        raise PrunelensError("expected at least one prompt, found none")
    model = dense if isinstance(dense, Model) else load(dense)
    candidates = open_candidates(model, compressed)
    encoded = encode(texts, model, chosen.chat_template, chosen.max_new_tokens)
    calibration = read_calibration(Path(chosen.calibration), model) if chosen.calibration else None
    study = _Study(model, candidates, encoded, chosen, reporter)
    return study.run(calibration)


def check_inputs(compressed: Sequence[Compressible], settings: dict[str, Any]) -> Settings:
    """Refuse what needs no model to be seen wrong.

    Raises:
        PrunelensError: settings without meaning, a malformed recipe, nothing to compare.
    """
    chosen = Settings(**{name: value for name, value in settings.items() if name != "prompts"})
    chosen.check()
    parse_candidates(compressed)
    return chosen


class _Study:
    """One comparison in progress."""

    def __init__(
        self,
        dense: Model,
        candidates: list[Candidate],
        prompts: list[Prompt],
        settings: Settings,
        reporter: Reporter,
    ) -> None:
        self.dense = dense
        self.candidates = candidates
        self.prompts = prompts
        self.settings = settings
        self.reporter = reporter
        self.parts: dict[str, list[pa.Table]] = {name: [] for name in SCHEMAS}
        self.seconds: dict[str, float] = {}

    def run(self, calibration: list[list[int]] | None) -> Comparison:
        greedy, sampled = self._timed("dense writes", self._write_dense)
        ranking = self._timed("ranking", lambda: self._rank(calibration, greedy))
        resolve_candidates(self.candidates, self.dense, ranking)
        trajectories = self._trajectories(greedy, [draw.continuation for draw in sampled])
        states = self._timed("reading", lambda: self._read(trajectories))
        forced = self._timed("comparing", lambda: self._measure(trajectories, states))
        self._timed("prompt end", lambda: self._measure_prompt_end(trajectories, states))
        for candidate, stats in zip(self.candidates, forced, strict=True):
            free, agreed = self._timed("free running", lambda c=candidate: self._run_free(c, greedy, sampled))
            self._measure_free(candidate, greedy, free, agreed)
            self._survive(candidate, trajectories, stats, greedy, free, agreed)
        self.parts["prompts"] = [prompts_table(self.prompts)]
        tables = {name: concat(name, parts) for name, parts in self.parts.items()}
        return self._collect(tables, ranking)

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)
        return result

    def _write_dense(self) -> tuple[list[Continuation], list[Draw]]:
        advance = self._writing("dense writes")
        chosen = self.settings
        ids = [prompt.token_ids for prompt in self.prompts]
        greedy, sampled = write_dense(
            self.dense,
            ids,
            chosen.max_new_tokens,
            chosen.temperature,
            chosen.seed,
            chosen.batch_size,
            advance,
        )
        for trace, written in (("greedy", greedy), ("sampled", [draw.continuation for draw in sampled])):
            self.parts["continuations"].append(continuation_rows("dense", trace, self.prompts, written, self.dense))
        return greedy, sampled

    def _writing(self, stage: str) -> Advance:
        return self.reporter(stage, 2 * len(self.prompts) * self.settings.max_new_tokens)

    def _rank(self, calibration: list[list[int]] | None, greedy: list[Continuation]) -> Ranking | None:
        if not any(candidate.recipe and candidate.recipe.needs_ranking for candidate in self.candidates):
            return None
        own = [
            [*prompt.token_ids, *continuation.token_ids]
            for prompt, continuation in zip(self.prompts, greedy, strict=True)
        ]
        texts = calibration or own
        advance = self.reporter("ranking sublayers", sum(map(len, texts)))
        return rank_redundancy(self.dense, texts, advance=advance)

    def _trajectories(self, greedy: list[Continuation], sampled: list[Continuation]) -> list[Trajectory]:
        return [
            Trajectory(index, trace, prompt.token_ids, tuple(written[index].token_ids), written[index].ended)
            for trace, written in (("greedy", greedy), ("sampled", sampled))
            for index, prompt in enumerate(self.prompts)
        ]

    def _read(self, trajectories: list[Trajectory]) -> list[Tensor]:
        """States of the dense model and then of each candidate, (T, d) each."""
        total = sum(len(trajectory.read_ids) for trajectory in trajectories)
        recipes = [candidate for candidate in self.candidates if candidate.model is None]
        drops = [candidate.drop for candidate in recipes]
        advance = self.reporter("dense and dropped models read", total)
        states, *dropped_states = forced_states(self.dense, trajectories, drops, advance=advance)
        by_label = dict(zip([candidate.label for candidate in recipes], dropped_states, strict=True))
        for candidate in self.candidates:
            if candidate.model is not None:
                advance = self.reporter(f"{candidate.label} reads", total)
                by_label[candidate.label] = forced_states(candidate.model, trajectories, advance=advance)[0]
        return [states, *[by_label[candidate.label] for candidate in self.candidates]]

    def _pairs(self, states: Sequence[Tensor]) -> list[Pair]:
        return [
            Pair(own, candidate.network(self.dense).head)
            for own, candidate in zip(states, self.candidates, strict=True)
        ]

    def _measure(self, trajectories: list[Trajectory], states: list[Tensor]) -> list[Stats]:
        tokens = torch.tensor([token for trajectory in trajectories for token in trajectory.token_ids])
        advance = self.reporter("comparing token probabilities", len(tokens))
        found = self._stream(states[0], self._pairs(states[1:]), tokens, advance)
        greedy = [trajectory for trajectory in trajectories if trajectory.trace == "greedy"]
        num_greedy = sum(len(trajectory.token_ids) for trajectory in greedy)
        for candidate, stats in zip(self.candidates, found, strict=True):
            self.parts["steps"].append(steps_rows(candidate.label, self.prompts, trajectories, stats))
            first = {name: value[:num_greedy] for name, value in stats.items()}
            self.parts["alternatives"].append(
                alternative_rows(candidate.label, self.prompts, greedy, first, self.dense)
            )
        return found

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
            self.parts["prompt_end"] += prompt_end_rows(candidate.label, self.prompts, spaces)

    def _run_free(
        self, candidate: Candidate, greedy: list[Continuation], sampled: list[Draw]
    ) -> tuple[list[Continuation], list[list[int]]]:
        chosen = self.settings
        ids = [prompt.token_ids for prompt in self.prompts]
        advance = self._writing(f"{candidate.label} writes")
        with candidate.running(self.dense) as model:
            return write_coupled(
                model,
                ids,
                sampled,
                chosen.max_new_tokens,
                chosen.temperature,
                chosen.seed,
                chosen.batch_size,
                advance,
            )

    def _measure_free(
        self,
        candidate: Candidate,
        greedy: list[Continuation],
        free: list[Continuation],
        agreed: list[list[int]],
    ) -> None:
        trajectories, left, right, parted = [], [], [], []
        for index, (dense, own) in enumerate(zip(greedy, free, strict=True)):
            steps = min(len(dense.token_ids), len(own.token_ids))
            tokens = tuple(dense.token_ids[:steps])
            trajectories.append(Trajectory(index, "free", self.prompts[index].token_ids, tokens, dense.ended))
            left.append(dense.states[:steps])
            right.append(own.states[:steps])
            parted.append(common_prefix(dense.token_ids, own.token_ids, self.settings.max_new_tokens))
        token_ids = torch.tensor([token for trajectory in trajectories for token in trajectory.token_ids])
        advance = self.reporter(f"comparing {candidate.label} in free running", len(token_ids))
        pair = Pair(torch.cat(right), candidate.network(self.dense).head)
        stats = self._stream(torch.cat(left), [pair], token_ids, advance)[0]
        rows = steps_rows(candidate.label, self.prompts, trajectories, stats, parted=parted)
        self.parts["steps"].append(rows)
        self.parts["continuations"].append(
            continuation_rows(candidate.label, "greedy", self.prompts, free, self.dense, agreed)
        )

    def _survive(
        self,
        candidate: Candidate,
        trajectories: list[Trajectory],
        stats: Stats,
        greedy: list[Continuation],
        free: list[Continuation],
        agreed: list[list[int]],
    ) -> None:
        horizon = self.settings.max_new_tokens
        lengths = [len(trajectory.token_ids) for trajectory in trajectories]
        pieces = {name: value.split(lengths) for name, value in stats.items()}
        each = [{name: pieces[name][row] for name in pieces} for row in range(len(trajectories))]
        half = len(self.prompts)
        texts = [(dense.token_ids, own.token_ids) for dense, own in zip(greedy, free, strict=True)]
        self.parts["survival"].append(survival_table(candidate.label, each[half:], each[:half], texts, agreed, horizon))

    def _collect(self, tables: dict[str, pa.Table], ranking: Ranking | None) -> Comparison:
        dense_parameters = Candidate("dense").num_parameters(self.dense)
        info: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "dense": _describe(self.dense) | {"parameters": dense_parameters},
            "compressed": [self._describe_candidate(candidate) for candidate in self.candidates],
            "ranking": _describe_ranking(ranking, self.settings.calibration),
            "settings": asdict(self.settings),
            "units": STAT_COLUMNS,
            "nulls": _nulls(tables, self.prompts),
            "notes": [note for model in self._models() for note in model.notes],
            "seconds": self.seconds,
            "versions": {name: version(name) for name in ("prunelens", "torch", "transformers", "numpy")},
        }
        info["summary"] = summarise(tables, info)
        return Comparison(Run(tables, info))

    def _models(self) -> list[Model]:
        return [self.dense, *[candidate.model for candidate in self.candidates if candidate.model]]

    def _describe_candidate(self, candidate: Candidate) -> dict[str, Any]:
        found: dict[str, Any] = {"label": candidate.label, "parameters": candidate.num_parameters(self.dense)}
        if candidate.recipe is not None:
            dropped = {kind: sorted(layers) for kind, layers in vars(candidate.drop).items() if layers}
            return found | {"recipe": str(candidate.recipe), "dropped": dropped}
        assert candidate.model is not None
        return found | _describe(candidate.model)


def _describe(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "family": model.network.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "num_layers": len(model.anatomy.blocks),
        "hidden_size": model.anatomy.hidden_size,
        "vocab_size": model.anatomy.vocab_size,
    }


def _describe_ranking(ranking: Ranking | None, calibration: str | None) -> dict[str, Any] | None:
    if ranking is None:
        return None
    return {
        "score": "mean cosine of the residual stream before and after, highest first",
        "calibration": calibration or "the dense model's greedy texts on the prompts",
        "num_tokens": ranking.num_tokens,
        "order": [
            {"kind": kind, "layer_idx": layer_idx, "score": ranking.scores[kind, layer_idx]}
            for kind, layer_idx in ranking.ordered("attention", "mlp", "block")
        ],
    }


def _nulls(tables: dict[str, pa.Table], prompts: list[Prompt]) -> dict[str, str]:
    """Why a column holds nulls."""
    found = {}
    for name in ("steps", "prompt_end"):
        for column in ("amplification", "amplification_estimate"):
            if tables[name][column].null_count:
                found[f"{name}.{column}"] = "the logits did not turn (0/0)"
    for prompt in prompts:
        if prompt.options_problem:
            found[f"prompt_end.options.{prompt.prompt_id}"] = prompt.options_problem
    return found
