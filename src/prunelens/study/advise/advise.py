"""Find the strongest recipe that keeps a use, hold it against cosine and chance, and say what it breaks."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from prunelens.errors import LARGEST, PrunelensError, check_real, check_seed, nearest
from prunelens.models.model import Model
from prunelens.progress import Reporter
from prunelens.study.advise.answers import AnswerCache, OutOfTimeError
from prunelens.study.advise.goal import Goal, coarse, loss_of, strongest
from prunelens.study.advise.outside import methods_tried, try_rankings
from prunelens.study.advise.running_costs import running_costs
from prunelens.study.advise.search import Search
from prunelens.study.advise.tables import ADVICE, SCHEMAS
from prunelens.study.advise.validate import TEXT_TOKENS, Validation, runner_up_of
from prunelens.study.calibration_texts import own_texts
from prunelens.study.claims import Claim, claimed
from prunelens.study.compare.describe import describe_model
from prunelens.study.evaluate.measure import TaskRunner, TaskSettings
from prunelens.study.store import Run
from prunelens.tasks.encoding import encode
from prunelens.tasks.kept_answers import answers_folder
from prunelens.tasks.prompts import CORE, prompts
from prunelens.tasks.suite import USES, TaskSelection, parse_tasks
from prunelens.tracing.forced import Trajectory
from prunelens.tracing.generate import Greedy, write

TASKS = {
    "retrieval": ("core_retrieval",),
    "multiple-choice": ("core_choice",),
    "short-generation": ("core_facts", "core_arithmetic", "core_copy"),
    "long-generation": ("core_long",),
}
"""What decides a use where no tasks are given."""
SEARCH_PROMPTS = 16
SEARCH_SHARE = 0.65
"""Share of the budget after which the search stops, so that the rest serves to check what it found."""
MARK, ANSWERS = "advice.json", "answers"


def run_advise(
    model: Model,
    aim: Goal,
    chosen: TaskSelection,
    folder: Path,
    budget: float | None,
    settings: TaskSettings,
    seed: int,
    reporter: Reporter,
    render: Callable[[Run], str],
) -> Run:
    """Search for the strongest recipe that keeps a use, then validate it on prompts and items it did not see.

    Args:
        model: the dense model.
        aim, chosen: as `check_advice` gives them.
        folder: where everything is kept; the result goes into a folder in it, named by the use.
        budget, seed, reporter: as `prunelens.advise`.
        settings: how the tasks are run.
        render: draws the page.

    Raises:
        PrunelensError: as `prunelens.advise`.
    """
    advising = _Advising(model, aim, chosen, folder, budget, settings, seed, reporter, render)
    with claimed(folder, MARK, json.dumps({"format": ADVICE.format}) + "\n", "search", ANSWERS) as claim:
        return advising.run(claim)


def check_advice(
    use: str,
    keep: float = 0.95,
    budget: float | None = None,
    tasks: str | Sequence[str] | None = None,
    long_tokens: int = 96,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Goal, TaskSelection, TaskSettings]:
    """Refuse what needs no model to be seen wrong; the arguments are those of `advise`.

    Raises:
        PrunelensError: an unknown use, a number without meaning, an unknown task.
    """
    check_seed(seed)
    settings = TaskSettings(limit=limit, long_tokens=long_tokens)
    settings.check()
    if use not in USES:
        raise PrunelensError(f"expected a use of {', '.join(USES)}, found {use!r}{nearest(use, USES)}")
    check_real("--keep", keep, 0.5, 1.0)
    if keep == 1:
        raise PrunelensError(f"expected --keep from 0.5 to below 1, found {keep}")
    if budget is not None:
        check_real("--budget (minutes)", budget, 0.0, float(LARGEST))
        if budget == 0:
            raise PrunelensError(f"expected --budget of more than 0 minutes, found {budget}")
    names = list(parse_tasks(tasks).tasks) if tasks is not None else list(TASKS[use])
    return Goal(use, keep), parse_tasks({use: names}), settings


class _Advising:
    """One search and its validation."""

    def __init__(
        self,
        model: Model,
        aim: Goal,
        chosen: TaskSelection,
        folder: Path,
        budget: float | None,
        settings: TaskSettings,
        seed: int,
        reporter: Reporter,
        render: Callable[[Run], str],
    ) -> None:
        self.model, self.aim, self.folder, self.budget, self.seed = model, aim, folder, budget, seed
        self.reporter, self.render = reporter, render
        self.answers = AnswerCache(folder / ANSWERS)
        self.about = {"fingerprint": model.fingerprint, "dtype": str(model.dtype), "version": 1}
        self.settings = replace(settings, subset="search")
        self.runner = TaskRunner(model, chosen, self.settings, reporter, answers=answers_folder())
        self._texts: Sequence[Sequence[int]] | None = None

    def run(self, claim: Claim) -> Run:
        """Search, validate, write; nothing in the folder is worth keeping where the use cannot be measured."""
        search_texts, other_texts = self._trajectories()
        search = Search(
            self.model,
            self.runner,
            self.aim,
            self.answers,
            search_texts[:SEARCH_PROMPTS],
            self._calibration,
            self.about,
            self.reporter,
        )
        self._first(search, claim)
        self._search(search)
        self.answers.allow(None)
        return self._validated(search, other_texts)

    def _first(self, search: Search, claim: Claim) -> None:
        """The dense model's own scores, which tell whether the use can be measured and the budget is enough."""
        dense = search.dense_scores(self.runner)
        claim.worthless = True
        loss_of(self.aim, dense, dense)
        claim.worthless = False
        search.notes += coarse(self.aim, dense)
        if self.budget is not None and self.answers.asked and self.answers.spent > 60 * self.budget:
            minutes = self.answers.spent / 60
            raise PrunelensError(
                f"the budget of {self.budget:g} minutes ended with the dense model's own tasks ({minutes:.1f} "
                f"minutes); give several times as much, or fewer items with --limit; what was measured is kept in "
                f"{self.folder}"
            )

    def _search(self, search: Search) -> None:
        self.answers.allow(60 * self.budget * SEARCH_SHARE if self.budget is not None else None)
        try:
            search.formats()
            search.masks()
            search.drops()
            try_rankings(search)
            search.together()
        except OutOfTimeError:
            search.notes.append(f"the budget of {self.budget:g} minutes ended the search; the same command resumes it")

    def _calibration(self) -> Sequence[Sequence[int]]:
        if self._texts is None:
            self._texts = self.answers.ask(
                self.about | {"ask": "calibration"},
                lambda: own_texts(self.model, self.reporter),
            )
        return self._texts

    def _trajectories(self) -> tuple[list[Trajectory], list[Trajectory]]:
        """The dense model's greedy texts on every second prompt, and on the others."""
        encoded = encode(prompts(CORE), self.model, True, TEXT_TOKENS, "remove it")
        ids = [prompt.token_ids for prompt in encoded]

        def answer() -> list[Any]:
            advance = self.reporter("dense writes", len(ids) * TEXT_TOKENS)
            written = write(self.model, ids, [Greedy() for _ in ids], TEXT_TOKENS, 32, advance)
            return [[one.token_ids, one.ended] for one in written]

        found = self.answers.ask(self.about | {"ask": "texts", "prompts": CORE, "tokens": TEXT_TOKENS}, answer)
        texts = [
            Trajectory(index, "greedy", prompt, tuple(tokens), ended)
            for index, (prompt, (tokens, ended)) in enumerate(zip(ids, found, strict=True))
        ]
        return texts[::2], texts[1::2]

    def _validated(self, search: Search, texts: list[Trajectory]) -> Run:
        ranked = strongest(search.tried)
        chosen = ranked[0] if ranked else None
        runner_up = runner_up_of(ranked)
        check = Validation(search, self.settings, self.seed)
        drop = check.best_drop(chosen)
        held_out, rows = check.kl(chosen, drop, texts)
        speeds = running_costs(search, drop) if drop is not None else []
        judged = check.tasks(chosen, runner_up, held_out)
        info = {
            "format": ADVICE.format,
            "format_version": ADVICE.version,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "dense": describe_model(self.model),
            "aim": asdict(self.aim) | {"tasks": list(self.runner.chosen.tasks), "budget": self.budget},
            "settings": asdict(self.settings),
            "chosen": check.described(chosen),
            "runner_up": check.described(runner_up),
            "closest": check.described(min(search.tried, key=lambda one: one.loss, default=None)),
            "held_out": held_out,
            **judged,
            "speeds": speeds,
            "notes": [*search.notes, *self.runner.tasks.notes, *self.model.notes],
            "seconds": round(self.answers.spent, 1),
            **methods_tried(),
            "versions": {name: version(name) for name in ("prunelens", "torch", "transformers")},
        }
        tables = {
            "tried": pa.Table.from_pylist([one.row() for one in search.tried], SCHEMAS["tried"]),
            "held_out": pa.Table.from_pylist(rows, SCHEMAS["held_out"]),
        }
        return self._write(Run(tables, info))

    def _write(self, run: Run) -> Run:
        ADVICE.write(run, self.folder / self.aim.use, self.render)
        return run
