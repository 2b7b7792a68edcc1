"""The search behind advice: a path of drops by final damage, a bisection over masks, and formats; each is judged."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.surgery.drop import NOTHING, Drop, num_parameters
from prunelens.progress import Reporter
from prunelens.pruning.apply import apply, check_recipe
from prunelens.pruning.plugins import outside
from prunelens.pruning.pruned import Calibration, Pruned
from prunelens.pruning.recipe import parse_recipe
from prunelens.study.advise.answers import AnswerCache
from prunelens.study.advise.goal import DROPS, REPAIRED, Goal, Trial, loss_of, strength
from prunelens.study.advise.held_out import kl_by_prompt
from prunelens.study.calibration_texts import with_repair_texts
from prunelens.study.evaluate.measure import TaskResult, TaskRunner
from prunelens.tasks.suite import Metric, MetricScores, files_hash
from prunelens.tracing.forced import Trajectory
from prunelens.tracing.greedy_drop import Part, damage_of_drops

SPARSITIES = tuple(round(0.05 * step, 2) for step in range(1, 15))
"""The masks that are bisected: 5 % to 70 % of each matrix."""
WIDTH = 12
"""After the first sweep over all sublayers only so many of the least damaging are measured again at each step."""
PATIENCE = 2
"""The path of drops ends after so many sizes in a row that do not keep the use."""
MASK = "wanda"
FORMATS = ("int8", "int4")


@dataclass
class Search:
    """A search in progress on the prompts and items of the search half.

    Attributes:
        dense: the dense model.
        bench: its tasks on the search half.
        aim: what is to be kept.
        ledger: what was found out already.
        trajectories: the dense model's texts that D1 reads.
        texts: calibration texts of masks.
        about: what every question of the ledger depends on.
        reporter: progress display.
    """

    dense: Model
    runner: TaskRunner
    aim: Goal
    answers: AnswerCache
    trajectories: Sequence[Trajectory]
    texts: Callable[[], Sequence[Sequence[int]]]
    about: dict[str, Any]
    reporter: Reporter
    tried: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _last: tuple[str, Pruned | None] = field(default=("", None), init=False, repr=False)
    _calibration: Calibration = field(default_factory=Calibration, init=False, repr=False)

    def drops(self) -> None:
        """Take out one sublayer after the other, each time the one with the least damage per byte; judge each size.

        A repair is tried at each size; the order of the drops is that without it.
        """
        drop, known, kl, failed = NOTHING, dict[Part, float](), 0.0, 0
        left = self._sublayers()
        while len(left) > 1 and failed < PATIENCE:
            wanted = left if not known else sorted(left, key=lambda part: known[part])[:WIDTH]
            answer = self._damage(drop, wanted)
            for part, value in zip(wanted, answer, strict=True):
                known[part] = (value - kl) / self._size(part)
            best = min(wanted, key=lambda part: (known[part], part))
            kl = answer[wanted.index(best)]
            drop |= Drop(**{best[0]: frozenset([best[1]])})
            left.remove(best)
            tried = self.judge(recipe_of(drop), DROPS, float(_count(drop)))
            tried.kl = kl
            repaired = self.judge(f"{recipe_of(drop)}+{repair_of(self.dense)}", REPAIRED, float(_count(drop)))
            repaired.kl = self._final_damage(repaired.recipe)
            failed = 0 if tried.keeps or repaired.keeps else failed + 1

    def masks(self) -> None:
        """The largest sparsity that keeps the use, by bisection: more zeros are taken to do more damage."""
        for mask in (MASK, *(method.name for method in outside("mask"))):
            low, high = -1, len(SPARSITIES)
            while high - low > 1:
                middle = (low + high) // 2
                sparsity = SPARSITIES[middle]
                family = "masks" if mask == MASK else f"masks by {mask}"
                if self.judge(f"{mask}:{sparsity:g}", family, sparsity).keeps:
                    low = middle
                else:
                    high = middle

    def formats(self) -> None:
        """Fewer bits for every matrix."""
        for bits in FORMATS:
            recipe = f"quantize:{bits}"
            try:
                check_recipe(parse_recipe(recipe), self.dense)
            except PrunelensError as error:
                self.notes.append(f"{recipe} was not tried: {error}")
            else:
                self.judge(recipe, "formats", float(bits.removeprefix("int")))

    def together(self) -> None:
        """The largest drops that keep the use, with the fewest bits that do, from the largest down to one that does."""
        drops = [one for one in self.tried if one.is_drop and one.keeps]
        drops.sort(key=strength, reverse=True)
        formats = sorted((one for one in self.tried if one.family == "formats" and one.keeps), key=strength)
        for drop in drops[:PATIENCE]:
            if formats and self.judge(f"{drop.recipe}+{formats[-1].recipe}", "drops and formats", drop.size).keeps:
                break

    def about_recipe(self, recipe: str) -> dict[str, Any]:
        """What every question about a recipe depends on, the versions of methods from outside too."""
        return self.about | {"recipe": recipe} | parse_recipe(recipe).made_with

    def _sublayers(self) -> list[Part]:
        return [(part.kind, block.layer_idx) for block in self.dense.anatomy.blocks for part in block.sublayers]

    def _size(self, part: Part) -> float:
        """Share of the dense parameters that a sublayer holds."""
        drop = Drop(**{part[0]: frozenset([part[1]])})
        whole = num_parameters(self.dense.network, self.dense.anatomy)
        return 1 - num_parameters(self.dense.network, self.dense.anatomy, drop) / whole

    def _damage(self, drop: Drop, wanted: list[Part]) -> list[float]:
        question = self.about | {"ask": "damage", "out": recipe_of(drop), "candidates": [list(part) for part in wanted]}

        def answer() -> list[float]:
            steps = sum(len(trajectory.token_ids) for trajectory in self.trajectories)
            advance = self.reporter(f"damage after {_count(drop)} drops", steps * (len(wanted) + 1))
            _, found = damage_of_drops(self.dense, self.trajectories, drop, wanted, advance=advance)
            return [float(found[part].mean()) for part in wanted]

        values: list[float] = self.answers.ask(question, answer)
        return values

    def _final_damage(self, recipe: str) -> float:
        """Mean KL at the head, as the path of drops counts it."""
        question = self.about_recipe(recipe) | {"ask": "final damage", "prompts": len(self.trajectories)}

        def answer() -> float:
            (found,) = kl_by_prompt(self.dense, self.trajectories, [self.pruned(recipe).variant])
            return sum(found) / len(found)

        value: float = self.answers.ask(question, answer)
        return value

    def judge(self, recipe: str, family: str, size: float) -> Trial:
        """Measure a recipe on the search half and keep what came of it."""
        sizes = self.sizes(recipe)
        asked = self.measure(self.runner, recipe)  # last, so that what was measured is judged when the time ends
        loss, number = loss_of(self.aim, self.dense_scores(self.runner), asked.scored)
        tried = Trial(recipe, family, float(size), *sizes, loss, loss <= 1, number)
        self.tried.append(tried)
        return tried

    def measure(self, runner: TaskRunner, recipe: str) -> TaskResult:
        """Item scores of a recipe, from the ledger or measured now."""
        question = self.about_recipe(recipe) | {
            "ask": "tasks",
            "tasks": list(runner.chosen.tasks),
            "uses": runner.chosen.uses,
            "files": files_hash(runner.chosen),
            "settings": asdict(runner.settings),
        }
        answer = self.answers.ask(question, lambda: _stored(runner.measure(recipe, self.pruned(recipe).variant)))
        return TaskResult([_scored(one) for one in answer["scored"]], [])

    def dense_scores(self, runner: TaskRunner) -> list[MetricScores]:
        """Item scores of the dense model, from the ledger or measured now."""
        question = self.about | {"ask": "tasks", "recipe": "", "tasks": list(runner.chosen.tasks)}
        question |= {
            "uses": runner.chosen.uses,
            "settings": asdict(runner.settings),
            "files": files_hash(runner.chosen),
        }
        answer = self.answers.ask(question, lambda: _stored(runner.dense_found))
        return [_scored(one) for one in answer["scored"]]

    def sizes(self, recipe: str) -> tuple[float, float, float]:
        """(parameters saved, bytes saved, share of zeros) of a recipe."""
        question = self.about_recipe(recipe) | {"ask": "sizes"}
        found: list[float] = self.answers.ask(question, lambda: _sizes(self.dense, self.pruned(recipe)))
        return found[0], found[1], found[2]

    def pruned(self, recipe: str) -> Pruned:
        """The model that a recipe makes; the last one is kept."""
        if self._last[0] != recipe:
            parsed = parse_recipe(recipe)
            if parsed.repair and not self._calibration.repair:
                asked = self.runner.questions
                self._calibration = with_repair_texts(
                    self._calibration, [parsed], self.dense, None, asked, self.reporter
                )
            if parsed.needs_calibration and not self._calibration.texts:
                self._calibration = replace(self._calibration, texts=self.texts())
            self._last = (recipe, apply(parsed, self.dense, self._calibration, reporter=self.reporter))
        assert self._last[1] is not None
        return self._last[1]


def recipe_of(drop: Drop) -> str:
    """A recipe that names the parts of a drop; empty for none."""
    parts = sorted([*(("a", index) for index in drop.attention), *(("m", index) for index in drop.mlp)], key=_by_depth)
    if not drop.mlp:
        return f"drop-attention@{','.join(str(index) for _, index in parts)}" if parts else ""
    if not drop.attention:
        return f"drop-mlp@{','.join(str(index) for _, index in parts)}"
    return f"drop-sublayers@{','.join(f'{letter}{index}' for letter, index in parts)}"


def repair_of(model: Model) -> str:
    """The repair that is tried: of a rank that costs about a tenth of an attention, tokens weighed as they count."""
    return f"repair:linear,rank={max(1, model.anatomy.hidden_size // 8)},weighted"


def _by_depth(part: tuple[str, int]) -> tuple[int, str]:
    return part[1], part[0]


def _count(drop: Drop) -> int:
    return len(drop.attention) + len(drop.mlp)


def _sizes(dense: Model, pruned: Pruned) -> list[float]:
    whole = num_parameters(dense.network, dense.anatomy)
    return [1 - pruned.num_parameters / whole, 1 - pruned.num_bytes / dense.weight_bytes, pruned.zero_share]


def _stored(found: TaskResult) -> dict[str, Any]:
    return {
        "scored": [{"metric": asdict(one.metric), "values": one.values, "parts": one.parts} for one in found.scored]
    }


def _scored(stored: dict[str, Any]) -> MetricScores:
    return MetricScores(Metric(**stored["metric"]), stored["values"], parts=stored.get("parts", {}))
