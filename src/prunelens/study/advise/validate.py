"""What a search found, on prompts and items that it did not see: against the cosine, chance and the runner-up."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.models.surgery.drop import Drop
from prunelens.pruning.recipe import parse_recipe
from prunelens.study.advise.goal import DROPS, Trial, loss_of, strongest
from prunelens.study.advise.held_out import compared, cosine_drop, kl_by_prompt, mean_kl, random_drops
from prunelens.study.advise.outside import rank
from prunelens.study.advise.search import Search, recipe_of, repair_of
from prunelens.study.evaluate.measure import TaskRunner, TaskSettings
from prunelens.study.evaluate.scores import score_rows
from prunelens.study.evaluate.verdict import judge
from prunelens.tasks.kept_answers import answers_folder
from prunelens.tasks.prompts import CORE, prompts
from prunelens.tasks.suite import CORE_TASKS, TaskSelection, parse_tasks
from prunelens.tracing.forced import Trajectory

TEXT_TOKENS = 32
"""Tokens of a text on which KL is measured."""


@dataclass(frozen=True)
class Validation:
    """Measures what a search found on its other half.

    Attributes:
        search: the search, which has ended.
        settings: how its tasks were run.
        seed: of the random drops that the found one is held against.
    """

    search: Search
    settings: TaskSettings
    seed: int

    def best_drop(self, chosen: Trial | None) -> Drop | None:
        """The drop in what was chosen, else the largest that keeps the use, else the first of the path."""
        drops = [one for one in strongest(self.search.tried) if one.is_drop]
        first = [one for one in self.search.tried if one.family == DROPS]
        for one in (*([chosen] if chosen is not None else []), *drops[:1], *first[:1]):
            for step in parse_recipe(one.recipe).drops:
                return step.choose(self.search.dense, None, Drop())
        return None

    def kl(
        self, chosen: Trial | None, drop: Drop | None, texts: list[Trajectory]
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """KL on the other prompts: what was chosen, the found drop, the same repaired, the cosine's and random ones."""
        recipes: list[tuple[str, str]] = []
        if drop is not None:
            recipes = [("found drop", recipe_of(drop)), ("cosine", recipe_of(cosine_drop(drop, rank(self.search))))]
            recipes += [("random", recipe_of(one)) for one in random_drops(drop, self.search.dense, self.seed)]
            recipes.append(("repaired", f"{recipe_of(drop)}+{repair_of(self.search.dense)}"))
        if chosen is not None:
            recipes.insert(0, ("chosen", chosen.recipe))
        kl = {recipe: self._kl(recipe, texts) for _, recipe in recipes}
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

    def _kl(self, recipe: str, texts: list[Trajectory]) -> list[float]:
        question = self.search.about_recipe(recipe) | {"ask": "held-out kl", "tokens": TEXT_TOKENS}
        found: list[float] = self.search.answers.ask(
            question, lambda: kl_by_prompt(self.search.dense, texts, [self.search.pruned(recipe).variant])[0]
        )
        return found

    def tasks(self, chosen: Trial | None, runner_up: Trial | None, held_out: dict[str, Any]) -> dict[str, Any]:
        """The other items of all core tasks for what was chosen; those of the use for what it is held against."""
        settings = TaskSettings(limit=self.settings.limit, subset="held-out", long_tokens=self.settings.long_tokens)
        own = self._runner(self.search.runner.chosen, settings)
        judged: dict[str, Any] = {"verdicts": [], "scores": [], "held_out_use": []}
        cosine = next((one["recipe"] for one in held_out["kl"] if one["role"] == "cosine"), None)
        wanted = [("chosen", chosen.recipe if chosen else None), ("runner-up", runner_up.recipe if runner_up else None)]
        for role, recipe in (*wanted, ("cosine, same size", cosine)):
            if recipe is not None:
                dense, scored = self.search.dense_scores(own), self.search.measure(own, recipe).scored
                try:
                    loss, number = loss_of(self.search.aim, dense, scored)
                except PrunelensError as error:  # at chance on these items
                    self.search.notes.append(f"on the items that the search did not see {error}")
                    break
                judged["held_out_use"].append({"role": role, "recipe": recipe, "loss": loss, "number": number})
        if chosen is not None:
            names = [name for name in CORE_TASKS if name not in self.search.runner.chosen.tasks]
            others = self._runner(parse_tasks(names), settings) if names else None
            runners = [own, *([others] if others else [])]
            dense = [one for runner in runners for one in self.search.dense_scores(runner)]
            scored = [one for runner in runners for one in self.search.measure(runner, chosen.recipe).scored]
            rows = score_rows(dense, scored)
            judged["verdicts"] = [line.as_dict() for line in judge(dense, scored, rows)]
            judged["scores"] = rows
        return judged

    def _runner(self, chosen: TaskSelection, settings: TaskSettings) -> TaskRunner:
        return TaskRunner(self.search.dense, chosen, settings, self.search.reporter, answers=answers_folder())

    def described(self, tried: Trial | None) -> dict[str, Any] | None:
        """A trial as the result holds it, with where its checkpoint loads."""
        if tried is None:
            return None
        return tried.row() | {"loads": parse_recipe(tried.recipe).loads_where(self.search.dense)}


def runner_up_of(ranked: Sequence[Trial]) -> Trial | None:
    """The strongest of another family, else the next strongest."""
    others = [one for one in ranked[1:] if one.family != ranked[0].family]
    return next(iter([*others, *ranked[1:]]), None)
