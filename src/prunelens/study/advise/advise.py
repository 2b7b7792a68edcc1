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
from prunelens.models.surgery.drop import Drop
from prunelens.progress import Reporter
from prunelens.pruning.recipe import parse_recipe
from prunelens.study.advise.answers import Ledger, OutOfTimeError
from prunelens.study.advise.held_out import compared, cosine_drop, kl_by_prompt, mean_kl, random_drops
from prunelens.study.advise.outside import methods_tried, rank, try_rankings
from prunelens.study.advise.running_costs import running_costs
from prunelens.study.advise.search import DROPS, Aim, Search, Tried, coarse, loss_of, recipe_of, repair_of, strongest
from prunelens.study.advise.tables import ADVICE, SCHEMAS
from prunelens.study.calibration_texts import own_texts
from prunelens.study.claims import Claim, claimed
from prunelens.study.compare.describe import describe_model
from prunelens.study.evaluate.measure import Bench, TaskSettings
from prunelens.study.evaluate.scores import score_rows
from prunelens.study.evaluate.verdict import judge
from prunelens.study.store import Run
from prunelens.tasks.encoding import encode
from prunelens.tasks.prompts import CORE, prompts
from prunelens.tasks.suite import CORE_TASKS, USES, Chosen, parse_tasks
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
TEXT_TOKENS = 32
SEARCH_SHARE = 0.65
"""Share of the budget after which the search stops, so that the rest serves to check what it found."""
MARK, ANSWERS = "advice.json", "answers"


def run_advise(
    model: Model,
    aim: Aim,
    chosen: Chosen,
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
    long_tokens: int = 256,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Aim, Chosen, TaskSettings]:
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
    return Aim(use, keep), parse_tasks({use: names}), settings


class _Advising:
    """One search and its validation."""

    def __init__(
        self,
        model: Model,
        aim: Aim,
        chosen: Chosen,
        folder: Path,
        budget: float | None,
        settings: TaskSettings,
        seed: int,
        reporter: Reporter,
        render: Callable[[Run], str],
    ) -> None:
        self.model, self.aim, self.folder, self.budget, self.seed = model, aim, folder, budget, seed
        self.reporter, self.render = reporter, render
        self.ledger = Ledger(folder / ANSWERS)
        self.about = {"fingerprint": model.fingerprint, "dtype": str(model.dtype), "version": 1}
        self.settings = replace(settings, subset="search")
        self.bench = Bench(model, chosen, self.settings, reporter)
        self._texts: Sequence[Sequence[int]] | None = None

    def run(self, claim: Claim) -> Run:
        """Search, validate, write; nothing in the folder is worth keeping where the use cannot be measured."""
        search_texts, other_texts = self._trajectories()
        search = Search(
            self.model,
            self.bench,
            self.aim,
            self.ledger,
            search_texts[:SEARCH_PROMPTS],
            self._calibration,
            self.about,
            self.reporter,
        )
        self._first(search, claim)
        self._search(search)
        self.ledger.allow(None)
        return self._validated(search, other_texts)

    def _first(self, search: Search, claim: Claim) -> None:
        """The dense model's own scores, which tell whether the use can be measured and the budget is enough."""
        dense = search.dense_scores(self.bench)
        claim.worthless = True
        loss_of(self.aim, dense, dense)
        claim.worthless = False
        search.notes += coarse(self.aim, dense)
        if self.budget is not None and self.ledger.asked and self.ledger.spent > 60 * self.budget:
            minutes = self.ledger.spent / 60
            raise PrunelensError(
                f"the budget of {self.budget:g} minutes ended with the dense model's own tasks ({minutes:.1f} "
                f"minutes); give several times as much, or fewer items with --limit; what was measured is kept in "
                f"{self.folder}"
            )

    def _search(self, search: Search) -> None:
        self.ledger.allow(60 * self.budget * SEARCH_SHARE if self.budget is not None else None)
        try:
            search.formats()
            search.masks()
            search.drops()
            try_rankings(search)
            search.together()
        except OutOfTimeError:
            search.notes.append(
                f"the budget of {self.budget:g} minutes ended the search; the same command goes on where it stopped"
            )

    def _calibration(self) -> Sequence[Sequence[int]]:
        if self._texts is None:
            self._texts = self.ledger.ask(
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

        found = self.ledger.ask(self.about | {"ask": "texts", "prompts": CORE, "tokens": TEXT_TOKENS}, answer)
        texts = [
            Trajectory(index, "greedy", prompt, tuple(tokens), ended)
            for index, (prompt, (tokens, ended)) in enumerate(zip(ids, found, strict=True))
        ]
        return texts[::2], texts[1::2]

    def _validated(self, search: Search, texts: list[Trajectory]) -> Run:
        ranked = strongest(search.tried)
        chosen = ranked[0] if ranked else None
        runner_up = _runner_up(ranked)
        drop = self._best_drop(search, chosen)
        held_out, rows = self._held_out_kl(search, chosen, drop, texts)
        speeds = running_costs(search, drop) if drop is not None else []
        judged = self._held_out_tasks(search, chosen, runner_up, held_out)
        info = {
            "format": ADVICE.format,
            "format_version": ADVICE.version,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "dense": describe_model(self.model),
            "aim": asdict(self.aim) | {"tasks": list(self.bench.chosen.tasks), "budget": self.budget},
            "settings": asdict(self.settings),
            "chosen": self._described(chosen),
            "runner_up": self._described(runner_up),
            "closest": self._described(min(search.tried, key=lambda one: one.loss, default=None)),
            "held_out": held_out,
            **judged,
            "speeds": speeds,
            "notes": [*search.notes, *self.bench.notes, *self.model.notes],
            "seconds": round(self.ledger.spent, 1),
            **methods_tried(),
            "versions": {name: version(name) for name in ("prunelens", "torch", "transformers")},
        }
        tables = {
            "tried": pa.Table.from_pylist([one.row() for one in search.tried], SCHEMAS["tried"]),
            "held_out": pa.Table.from_pylist(rows, SCHEMAS["held_out"]),
        }
        return self._write(Run(tables, info))

    def _best_drop(self, search: Search, chosen: Tried | None) -> Drop | None:
        """The drop in what was chosen, else the largest that keeps the use, else the first of the path."""
        drops = [one for one in strongest(search.tried) if one.is_drop]
        first = [one for one in search.tried if one.family == DROPS]
        for one in (*([chosen] if chosen is not None else []), *drops[:1], *first[:1]):
            for step in parse_recipe(one.recipe).drops:
                return step.choose(self.model, None, Drop())
        return None

    def _held_out_kl(
        self, search: Search, chosen: Tried | None, drop: Drop | None, texts: list[Trajectory]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """KL on the other prompts: what was chosen, the found drop, the same repaired, the cosine's and random ones."""
        recipes: list[tuple[str, str]] = []
        if drop is not None:
            recipes = [("found drop", recipe_of(drop)), ("cosine", recipe_of(cosine_drop(drop, rank(search))))]
            recipes += [("random", recipe_of(one)) for one in random_drops(drop, self.model, self.seed)]
            recipes.append(("repaired", f"{recipe_of(drop)}+{repair_of(self.model)}"))
        if chosen is not None:
            recipes.insert(0, ("chosen", chosen.recipe))
        kl = {recipe: self._kl(search, recipe, texts) for _, recipe in recipes}
        names = [prompt.prompt_id for prompt in prompts(CORE)]
        rows = [
            {"recipe": recipe, "role": role, "prompt_id": names[text.prompt], "kl": value}
            for role, recipe in recipes
            for text, value in zip(texts, kl[recipe], strict=True)
        ]
        found: dict[str, Any] = {"kl": [{"role": role, "recipe": name} | mean_kl(kl[name]) for role, name in recipes]}
        by_role = dict(reversed(recipes))
        if drop is not None:
            found["against_cosine"] = compared(kl, by_role["found drop"], by_role["cosine"])
            randoms = [recipe for role, recipe in recipes if role == "random"]
            kl["random"] = [sum(values) / len(randoms) for values in zip(*(kl[name] for name in randoms), strict=True)]
            found["against_random"] = compared(kl, by_role["found drop"], "random")
            found["against_unrepaired"] = compared(kl, by_role["repaired"], by_role["found drop"])
        return found, rows

    def _kl(self, search: Search, recipe: str, texts: list[Trajectory]) -> list[float]:
        question = search.about_recipe(recipe) | {"ask": "held-out kl", "tokens": TEXT_TOKENS}
        found: list[float] = self.ledger.ask(
            question, lambda: kl_by_prompt(self.model, texts, [search.pruned(recipe).variant])[0]
        )
        return found

    def _held_out_tasks(
        self, search: Search, chosen: Tried | None, runner_up: Tried | None, held_out: dict[str, Any]
    ) -> dict[str, Any]:
        """The other items of all core tasks for what was chosen; those of the use for what it is held against."""
        settings = TaskSettings(limit=self.settings.limit, subset="held-out", long_tokens=self.settings.long_tokens)
        own = Bench(self.model, self.bench.chosen, settings, self.reporter)
        judged: dict[str, Any] = {"verdicts": [], "scores": [], "held_out_use": []}
        cosine = next((one["recipe"] for one in held_out["kl"] if one["role"] == "cosine"), None)
        wanted = [("chosen", chosen.recipe if chosen else None), ("runner-up", runner_up.recipe if runner_up else None)]
        for role, recipe in (*wanted, ("cosine, same size", cosine)):
            if recipe is not None:
                dense, scored = search.dense_scores(own), search.measure(own, recipe).scored
                try:
                    loss, number = loss_of(self.aim, dense, scored)
                except PrunelensError as error:  # at chance on these items
                    search.notes.append(f"on the items that the search did not see {error}")
                    break
                judged["held_out_use"].append({"role": role, "recipe": recipe, "loss": loss, "number": number})
        if chosen is not None:
            names = [name for name in CORE_TASKS if name not in self.bench.chosen.tasks]
            others = Bench(self.model, parse_tasks(names), settings, self.reporter) if names else None
            benches = [own, *([others] if others else [])]
            dense = [one for bench in benches for one in search.dense_scores(bench)]
            scored = [one for bench in benches for one in search.measure(bench, chosen.recipe).scored]
            rows = score_rows(dense, scored)
            judged["verdicts"] = [line.as_dict() for line in judge(dense, scored, rows)]
            judged["scores"] = rows
        return judged

    def _described(self, tried: Tried | None) -> dict[str, Any] | None:
        if tried is None:
            return None
        return tried.row() | {"loads": parse_recipe(tried.recipe).loads_where(self.model)}

    def _write(self, run: Run) -> Run:
        ADVICE.write(run, self.folder / self.aim.use, self.render)
        return run


def _runner_up(ranked: Sequence[Tried]) -> Tried | None:
    """The strongest of another family, else the next strongest."""
    others = [one for one in ranked[1:] if one.family != ranked[0].family]
    return next(iter([*others, *ranked[1:]]), None)
