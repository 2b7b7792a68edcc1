"""The search for a recipe: what is asked once, what keeps a use, each part of the path, and whole runs."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import prunelens.study.advise.advise as advise_module
import prunelens.study.advise.answers as answers_module
import prunelens.study.advise.search as search_module
import prunelens.study.advise.validate as validate_module
from conftest import COMMON, text_model, tiny_model
from oracle import zeroed
from prunelens.api import advise
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import NOTHING, Drop
from prunelens.models.surgery.variant import Variant
from prunelens.progress import silent
from prunelens.pruning.recipe import parse_recipe
from prunelens.pruning.redundancy import rank_redundancy
from prunelens.report.pages.advise import render_advice
from prunelens.report.pages.rerender import render_again
from prunelens.results import Advice
from prunelens.study.advise.answers import AnswerCache, OutOfTimeError
from prunelens.study.advise.goal import Goal, Trial, coarse, loss_of, strongest
from prunelens.study.advise.held_out import NUM_RANDOM, compared, cosine_drop, kl_by_prompt, mean_kl, random_drops
from prunelens.study.advise.search import PATIENCE, SPARSITIES, Search, recipe_of, repair_of
from prunelens.study.evaluate.measure import TaskRunner, TaskSettings
from prunelens.study.store import Run
from prunelens.tasks.prompts import prompts
from prunelens.tasks.suite import CORE_TASKS, Metric, MetricScores, parse_tasks
from prunelens.tracing.forced import Trajectory
from prunelens.tracing.greedy_drop import Part, damage_of_drops

USE = "long-generation"
ASKED = {"limit": 4, "long_tokens": 12}
CHOICE = Metric("choice", "acc", "multiple-choice", 0.25, decides="kept")
FACTS = Metric("facts", "exact_match", "short-generation", decides="kept")
COPY = Metric("copy", "exact_match", "short-generation", decides="kept")
NDCG = Metric("search", "ndcg_at_10", "retrieval", 0.125, decides="kept")
OVERLAP = Metric("search", "overlap_at_10", "retrieval", 0.125, decides="agreement")
NLL = Metric("long", "nll_dense", USE, better="lower", decides="nll")
LOOPS = Metric("long", "loops", USE, better="lower", decides="loops")
LENGTH = Metric("long", "length", USE, better=None)
FIRST_SECONDS = 100.0
HOSTILE = "<script>alert(1)</script>&\"'\u202e\x1b[31m"


@pytest.fixture(scope="module")
def dense() -> Model:
    return text_model()


# --------------------------------------------------------------------------- the cache of answers


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now = FIRST_SECONDS

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(answers_module, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


class Answers:
    """Counts how often it is asked."""

    def __init__(self, answer: Any = None) -> None:
        self.answer, self.count = answer, 0

    def __call__(self) -> Any:
        self.count += 1
        return self.answer


def refuse() -> Any:
    raise AssertionError("it was asked again")


def test_a_question_is_asked_once_and_its_answer_survives(tmp_path: Path) -> None:
    cache, answers = AnswerCache(tmp_path / "answers"), Answers({"a": (1, 2.5), "ü": None})
    first = cache.ask({"ask": "this", "of": ["x", 1]}, answers)
    assert first == {"a": [1, 2.5], "ü": None}  # as it is read back
    assert cache.ask({"of": ["x", 1], "ask": "this"}, refuse) == first
    assert AnswerCache(tmp_path / "answers").ask({"ask": "this", "of": ("x", 1)}, refuse) == first
    assert (answers.count, cache.asked) == (1, 1)
    assert cache.ask({"ask": "this", "of": ["x", 2]}, Answers(False)) is False
    assert cache.ask({"ask": "this", "of": ["x", 2]}, refuse) is False
    assert cache.asked == 2
    assert len(list((tmp_path / "answers").iterdir())) == 2


def test_only_new_questions_need_time(tmp_path: Path, clock: Clock) -> None:
    cache = AnswerCache(tmp_path, seconds=10.0)
    clock.now += 10
    assert cache.spent == 10
    assert cache.ask({"place": 0}, Answers(7)) == 7  # the last moment
    clock.now += 0.5
    assert cache.ask({"place": 0}, refuse) == 7
    with pytest.raises(OutOfTimeError):
        cache.ask({"place": 1}, refuse)
    cache.allow(11.0)
    assert cache.ask({"place": 1}, Answers(8)) == 8
    cache.allow(0.0)
    with pytest.raises(OutOfTimeError):
        cache.ask({"place": 2}, refuse)
    cache.allow(None)
    assert cache.ask({"place": 2}, Answers(9)) == 9
    assert cache.asked == 3


@pytest.mark.parametrize("content", [b"", b'{"question": {"ask', b"[]", b"null", b"7", b"{}", b"\xff\xfe", b'"answer"'])
def test_a_damaged_answer_is_asked_anew(tmp_path: Path, content: bytes) -> None:
    AnswerCache(tmp_path).ask({"place": 0}, Answers([1]))
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    cache, answers = AnswerCache(tmp_path), Answers([2])
    assert cache.ask({"place": 0}, answers) == [2]
    assert cache.ask({"place": 0}, refuse) == [2]
    assert (answers.count, cache.asked) == (1, 1)


def test_a_failed_answer_leaves_nothing(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "answers")
    with pytest.raises(AssertionError):
        cache.ask({"place": 0}, refuse)
    assert cache.asked == 0
    assert not (tmp_path / "answers").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(PrunelensError, match=r"cannot be kept in .*file"):
        AnswerCache(tmp_path / "file").ask({"place": 0}, Answers(1))


# --------------------------------------------------------------------------- what keeps a use


def scored(metric: Metric, *values: float) -> MetricScores:
    return MetricScores(metric, {f"item-{place}": float(value) for place, value in enumerate(values)})


def right(metric: Metric, count: int, total: int) -> MetricScores:
    return scored(metric, *[1] * count, *[0] * (total - count))


@pytest.mark.parametrize("keep", [0.5, 0.75, 0.8, 0.9, 0.95])
def test_a_score_at_the_tolerance_keeps_and_one_item_less_does_not(keep: float) -> None:
    aim, edges = Goal("short-generation", keep), 0
    for total in (8, 10, 12, 20, 30, 40):
        for dense in range(total // 2, total + 1):
            edge = round(dense * keep)
            if abs(dense * keep - edge) > 1e-9:
                continue
            edges += 1
            loss, number = loss_of(aim, [right(FACTS, dense, total)], [right(FACTS, edge, total)])
            assert loss == 1, (dense, edge, total)
            assert number == f"{100 * keep:.1f} % of the dense score"
            below, _ = loss_of(aim, [right(FACTS, dense, total)], [right(FACTS, edge - 1, total)])
            assert below == pytest.approx((1 - (edge - 1) / dense) / (1 - keep))
            assert below > 1
    assert edges >= 4


@pytest.mark.parametrize("keep", [0.75, 0.95])
def test_costs_at_the_tolerance_keep(keep: float) -> None:
    aim = Goal(USE, keep)
    nll = [scored(NLL, *[2.0] * 8)], [scored(NLL, *[2 + 2 * (1 - keep)] * 8)]
    assert loss_of(aim, *nll) == (1, f"{2 * (1 - keep):+.3f} nats per token")
    more = [scored(NLL, *[2.0] * 8)], [scored(NLL, *[2.001 + 2 * (1 - keep)] * 8)]
    assert loss_of(aim, *more)[0] > 1
    loops = [right(LOOPS, 20, 100)], [right(LOOPS, 20 + round(100 * (1 - keep)), 100)]
    assert loss_of(aim, *loops) == (1, f"{100 * (1 - keep):+.1f} points of looping texts")
    assert loss_of(aim, [right(LOOPS, 20, 100)], [right(LOOPS, 10, 100)])[0] < 0
    assert loss_of(aim, *(left + right for left, right in zip(nll, loops, strict=True)))[0] == 1


def test_the_worst_number_of_the_class_decides() -> None:
    aim = Goal(USE, 0.75)
    dense = [scored(NLL, 2, 2), scored(LOOPS, 0, 0), scored(LENGTH, 9, 9), right(FACTS, 4, 4)]
    own = [scored(NLL, 2.25, 2.25), scored(LOOPS, 1, 0), scored(LENGTH, 1, 1), right(FACTS, 0, 4)]
    assert loss_of(aim, dense, own) == (2, "+50.0 points of looping texts")
    assert loss_of(aim, dense, [own[0], scored(LOOPS, 0, 0), *own[2:]]) == (0.5, "+0.250 nats per token")


def test_tasks_of_one_class_count_together_and_those_at_chance_do_not() -> None:
    dense = [right(FACTS, 8, 8), right(COPY, 4, 8)]
    loss, number = loss_of(Goal("short-generation", 0.5), dense, [right(FACTS, 8, 8), right(COPY, 1, 8)])
    assert (loss, number) == (0.5, "75.0 % of the dense score")
    alone, _ = loss_of(Goal("short-generation", 0.5), [dense[0], right(COPY, 0, 8)], [dense[0], right(COPY, 8, 8)])
    assert alone == 0


def test_neighbours_decide_only_where_nothing_better_does() -> None:
    aim = Goal("retrieval", 0.75)
    neighbours = scored(OVERLAP, *[1] * 8), scored(OVERLAP, *[0.5] * 8)
    found = loss_of(aim, [right(NDCG, 0, 8), neighbours[0]], [right(NDCG, 0, 8), neighbours[1]])
    kept = (0.5 - 0.125) / 0.875  # beyond what a random order shares
    assert found == (pytest.approx((1 - kept) / 0.25), "42.9 % of the neighbours beyond chance")
    found = loss_of(aim, [right(NDCG, 8, 8), neighbours[0]], [right(NDCG, 8, 8), neighbours[1]])
    assert found == (0, "100.0 % of the dense score")


def test_a_use_at_chance_cannot_be_kept() -> None:
    for use, dense in (("multiple-choice", right(CHOICE, 2, 8)), ("short-generation", right(FACTS, 0, 8))):
        with pytest.raises(PrunelensError, match=rf"at chance on every task for {use}.*--tasks"):
            loss_of(Goal(use), [dense], [dense])
    assert loss_of(Goal("multiple-choice"), [right(CHOICE, 8, 8)], [right(CHOICE, 8, 8)])[0] == 0


def tried(recipe: str, bytes_saved: float, zeros: float = 0.0, loss: float = 0.0, family: str = "drops") -> Trial:
    return Trial(recipe, family, 1.0, bytes_saved, bytes_saved, float(zeros), float(loss), loss <= 1, "")


def test_the_strongest_saves_most_bytes_then_most_zeros_then_loses_least() -> None:
    order = [tried("a", 0.5), tried("b", 0.2, 0.3, 0.9), tried("c", 0.2, 0.1, 0.2), tried("d", 0.2, 0.1, 0.3)]
    given = [tried("z", 0.9, 0.9, 1.5), order[3], order[1], order[0], order[2]]
    assert strongest(given) == order
    assert strongest(given[:1]) == []


LAYERS = st.frozensets(st.integers(0, 3))


@given(LAYERS, LAYERS)
def test_a_drop_becomes_a_recipe_and_comes_back(attention: frozenset[int], mlp: frozenset[int]) -> None:
    drop = Drop(attention=attention, mlp=mlp)
    text = recipe_of(drop)
    if drop == NOTHING:
        assert text == ""
        return
    recipe = parse_recipe(text)
    (step,) = recipe.drops
    assert str(recipe) == text
    assert step.choose(SHARED, None, NOTHING) == drop


SHARED = tiny_model()


def test_recipes_name_parts_in_order_of_depth() -> None:
    assert recipe_of(Drop(attention=frozenset([11, 2]))) == "drop-attention@2,11"
    assert recipe_of(Drop(mlp=frozenset([3, 0]))) == "drop-mlp@0,3"
    assert recipe_of(Drop(attention=frozenset([2, 1]), mlp=frozenset([1]))) == "drop-sublayers@a1,m1,a2"


# --------------------------------------------------------------------------- the path


@pytest.fixture
def search(dense: Model, tmp_path: Path) -> Search:
    """A search that has not begun."""
    runner = TaskRunner(dense, parse_tasks({USE: ["core_long"]}), TaskSettings(limit=2, long_tokens=4, subset="search"))
    return Search(dense, runner, Goal(USE), AnswerCache(tmp_path), [], list, {"fingerprint": "f"}, silent)


def judging(search: Search, keeps: Callable[[str], bool]) -> list[str]:
    """Let this judge; the recipes that it is asked are listed."""
    asked: list[str] = []

    def judge(recipe: str, family: str, size: float) -> Trial:
        asked.append(recipe)
        found = Trial(
            recipe, family, float(size), 0.0, size / 100, 0.0, float(not keeps(recipe)) * 2, keeps(recipe), ""
        )
        search.tried.append(found)
        return found

    search.judge = judge  # type: ignore[method-assign]
    return asked


@pytest.mark.parametrize("edge", range(-1, len(SPARSITIES)))
def test_masks_find_the_largest_sparsity_that_keeps(search: Search, edge: int) -> None:
    asked = judging(search, lambda recipe: SPARSITIES.index(float(recipe.removeprefix("wanda:"))) <= edge)
    search.masks()
    assert len(asked) == len(set(asked)) <= 4
    assert {one.family for one in search.tried} == {"masks"}
    keeping = [one.size for one in search.tried if one.keeps]
    assert max(keeping, default=0) == (SPARSITIES[edge] if edge >= 0 else 0)
    if edge + 1 < len(SPARSITIES):  # the next one is known not to keep
        assert SPARSITIES[edge + 1] in [one.size for one in search.tried if not one.keeps]


def test_sparsities_go_from_5_to_70_percent() -> None:
    assert [f"{sparsity:g}" for sparsity in SPARSITIES] == [f"{step / 20:g}" for step in range(1, 15)]


def cost_of(drop: Drop) -> float:
    """An invented damage, nats: MLPs do more, and neighbours that are both out do even more."""
    attention = sum(0.011 * (5 + (3 * index) % 4) for index in drop.attention)
    mlp = sum(0.016 * (4 + (5 * index) % 7) for index in drop.mlp)
    pairs = len(drop.attention & drop.mlp) + sum(index + 1 in drop.attention for index in drop.attention)
    return attention + mlp + 0.05 * pairs


def with_part(drop: Drop, part: Part) -> Drop:
    return drop | Drop(**{part[0]: frozenset([part[1]])})


def parameters(model: Model, part: Part) -> int:
    layer = model.network.model.layers[part[1]]
    modules = {
        "attention": (layer.self_attn, layer.input_layernorm),
        "mlp": (layer.mlp, layer.post_attention_layernorm),
    }
    return sum(weight.numel() for module in modules[part[0]] for weight in module.parameters())


def expected_path(model: Model, width: int, keeps: Callable[[str], bool]) -> tuple[list[str], list[list[Part]]]:
    """(recipes judged, candidates measured) by the definition: least added damage per parameter first."""
    left = [(kind, index) for index in range(4) for kind in ("attention", "mlp")]
    known: dict[Part, float] = {}
    drop, failed, recipes, measured = NOTHING, 0, [], []
    while len(left) > 1 and failed < PATIENCE:
        wanted = sorted(left, key=lambda part: known[part])[:width] if known else list(left)
        measured.append(wanted)
        for part in wanted:
            known[part] = (cost_of(with_part(drop, part)) - cost_of(drop)) / parameters(model, part)
        best = min(wanted, key=lambda part: known[part])
        drop = with_part(drop, best)
        left.remove(best)
        recipes.append(recipe_of(drop))
        failed = 0 if keeps(recipes[-1]) else failed + 1
    return recipes, measured


@pytest.mark.parametrize("width", [2, 4, 12])
@pytest.mark.parametrize("failing", [(), (1, 2), (2, 4, 5), (3, 4), (1, 3, 5, 7)])
def test_drops_take_the_least_damage_per_byte(
    search: Search, width: int, failing: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def keeps(recipe: str) -> bool:
        (step,) = parse_recipe(recipe).drops
        return len(step.parts) not in failing

    measured: list[list[Part]] = []

    def damage(drop: Drop, wanted: list[Part]) -> list[float]:
        measured.append(list(wanted))
        return [cost_of(with_part(drop, part)) for part in wanted]

    monkeypatch.setattr(search_module, "WIDTH", width)
    monkeypatch.setattr(search, "_damage", damage)
    monkeypatch.setattr(search, "_final_damage", lambda recipe: float(len(recipe)))
    asked = judging(search, keeps)
    search.drops()
    recipes, candidates = expected_path(search.dense, width, keeps)
    assert asked == [recipe + repair for recipe in recipes for repair in ("", f"+{repair_of(search.dense)}")]
    assert measured == candidates
    assert [one.size for one in search.tried[::2]] == list(range(1, len(recipes) + 1))
    assert len(recipes) == {(): 7, (1, 2): 2, (2, 4, 5): 5, (3, 4): 4, (1, 3, 5, 7): 7}[failing]
    for plain, repaired in zip(search.tried[::2], search.tried[1::2], strict=True):
        (step,) = parse_recipe(plain.recipe).drops
        assert plain.kl == pytest.approx(cost_of(step.choose(search.dense, None, NOTHING)))
        assert (plain.family, repaired.family) == ("drops", "repaired drops")
        assert repaired.kl == len(repaired.recipe)


def test_what_is_left_in_an_invented_path_depends_on_bytes(dense: Model) -> None:
    by_damage = min(
        ((kind, index) for index in range(4) for kind in ("attention", "mlp")),
        key=lambda part: cost_of(with_part(NOTHING, part)),
    )
    recipes, _ = expected_path(dense, 12, lambda recipe: True)
    assert recipes[0] != recipe_of(with_part(NOTHING, by_damage))


def test_the_largest_drops_are_joined_with_the_fewest_bits(search: Search) -> None:
    search.tried = [
        tried("drop-mlp@1", 0.1),
        tried("drop-mlp@1,2", 0.2),
        tried("drop-mlp@1,2,3", 0.3),
        tried("drop-mlp@0,1,2,3", 0.4, loss=3.0),
        tried("quantize:int8", 0.5, family="formats"),
        tried("quantize:int4", 0.7, family="formats"),
        tried("wanda:0.5", 0.0, 0.5, family="masks"),
    ]
    before = list(search.tried)
    asked = judging(search, lambda recipe: False)
    search.together()
    assert asked == ["drop-mlp@1,2,3+quantize:int4", "drop-mlp@1,2+quantize:int4"]
    search.tried = before
    asked = judging(search, lambda recipe: True)
    search.together()
    assert asked == ["drop-mlp@1,2,3+quantize:int4"]
    search.tried = [one for one in before if one.family == "drops"]
    asked = judging(search, lambda recipe: True)
    search.together()
    assert asked == []


def test_a_format_that_cannot_be_made_is_a_note(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(recipe: Any, model: Model) -> None:
        if str(recipe) == "quantize:int4":
            raise PrunelensError("no library")

    monkeypatch.setattr(search_module, "check_recipe", check)
    asked = judging(search, lambda recipe: True)
    search.formats()
    assert asked == ["quantize:int8"]
    assert search.notes == ["quantize:int4 was not tried: no library"]


def test_a_judgement_is_kept_in_the_ledger(search: Search) -> None:
    first = search.judge("drop-mlp@1", "drops", 1.0)
    assert search.tried == [first]
    count = search.answers.asked
    search.answers.allow(0.0)
    assert search.judge("drop-mlp@1", "drops", 1.0) == first
    assert search.answers.asked == count
    whole = sum(weight.numel() for weight in search.dense.network.parameters())
    assert first.parameters_saved == pytest.approx(parameters(search.dense, ("mlp", 1)) / whole)
    assert first.bytes_saved == pytest.approx(first.parameters_saved, abs=1e-5)
    assert first.zeros == 0
    assert first.keeps == (first.loss <= 1)


def test_damage_is_asked_of_the_trajectories(search: Search) -> None:
    search.trajectories = [Trajectory(0, "greedy", (5, 9, 33), (71, 8, 8), False), Trajectory(1, "x", (4,), (9,), True)]
    drop, wanted = Drop(mlp=frozenset([2])), [("attention", 1), ("mlp", 0)]
    _, damage = damage_of_drops(search.dense, search.trajectories, drop, wanted)
    assert search._damage(drop, wanted) == [float(damage[part].mean()) for part in wanted]
    search.answers.allow(0.0)
    assert search._damage(drop, wanted) == [float(damage[part].mean()) for part in wanted]


def test_another_class_of_the_same_task_is_another_question(search: Search, dense: Model) -> None:
    settings = search.runner.settings
    other = TaskRunner(dense, parse_tasks({"short-generation": ["core_long"]}), settings)
    assert {one.metric.use for one in search.dense_scores(search.runner)} == {USE}
    assert {one.metric.use for one in search.dense_scores(other)} == {"short-generation"}
    assert {one.metric.use for one in search.measure(search.runner, "drop-mlp@1").scored} == {USE}
    assert {one.metric.use for one in search.measure(other, "drop-mlp@1").scored} == {"short-generation"}


# --------------------------------------------------------------------------- what it is held against


@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
def test_drops_it_is_held_against_have_the_same_size(family: str) -> None:
    model = tiny_model(family)
    layers = {
        kind: [block.layer_idx for block in model.anatomy.blocks if block.find(kind)] for kind in ("attention", "mlp")
    }
    ranking = rank_redundancy(model, [[5, 9, 33, 71], [4, 90, 17]])
    for num_attention, num_mlp in ((1, 0), (0, 2), (2, 1)):
        drop = Drop(attention=frozenset(layers["attention"][:num_attention]), mlp=frozenset(layers["mlp"][:num_mlp]))
        cosine = cosine_drop(drop, ranking)
        for kind, count in (("attention", num_attention), ("mlp", num_mlp)):
            by_score = sorted(layers[kind], key=lambda index: -ranking.scores[kind, index])
            assert getattr(cosine, kind) == set(by_score[:count])
        found = random_drops(drop, model, 0)
        assert len(found) == NUM_RANDOM
        for one in found:
            assert (len(one.attention), len(one.mlp), len(one.block)) == (num_attention, num_mlp, 0)
            assert one.attention <= set(layers["attention"])
            assert one.mlp <= set(layers["mlp"])
    assert random_drops(drop, model, 0) == found
    assert len({recipe_of(one) for seed in range(20) for one in random_drops(drop, model, seed)}) > 5


def test_a_tie_is_won_by_neither() -> None:
    kl = {"a": [0.5, 0.1, 0.4, 0.2], "b": [0.1, 0.5, 0.2, 0.4], "c": [0.6, 0.2, 0.5, 0.3]}
    assert compared(kl, "a", "b")["better"] is None
    same = compared(kl, "a", "a")
    assert same == {"left": "a", "right": "a", "difference": {"mean": 0, "low": 0, "high": 0}, "better": None}
    better = compared(kl, "a", "c")
    assert better["better"] == "a"
    assert better["difference"]["mean"] == pytest.approx(-0.1)
    assert better["difference"]["high"] < 0
    assert compared(kl, "c", "a")["better"] == "a"
    assert mean_kl(kl["a"])["mean"] == pytest.approx(0.3)


def test_kl_by_prompt_equals_its_definition() -> None:
    dense = tiny_model("llama", torch.float64)
    networks = [zeroed(dense.network, attention=[1], mlp=[3]), tiny_model("llama", torch.float64, seed=1).network]
    drop = Drop(attention=frozenset([1]), mlp=frozenset([3]))
    texts = [Trajectory(0, "greedy", (5, 9, 33), (71, 8, 8), False), Trajectory(1, "greedy", (4, 2), (9,), True)]
    found = kl_by_prompt(dense, texts, [Variant(wrap(networks[1])), Variant(dense, drop), Variant(dense)])
    assert found[2] == [0, 0]
    for network, own in zip(networks[::-1], found, strict=False):
        for text, value in zip(texts, own, strict=True):
            ids = torch.tensor([[*text.prompt_ids, *text.token_ids]])
            with torch.inference_mode():
                log_p, log_q = (one(ids).logits[0].log_softmax(-1) for one in (dense.network, network))
            steps = (log_p.exp() * (log_p - log_q)).sum(-1)[len(text.prompt_ids) - 1 : -1]
            assert value == pytest.approx(steps.mean().item(), rel=1e-9)


def loads_where(recipe: str, model: Model) -> str:
    return parse_recipe(recipe).loads_where(model)


def test_where_a_recipe_loads() -> None:
    assert loads_where("drop-mlp@1", SHARED).endswith("no smaller and no faster; prunelens leaves them out")
    assert "whole blocks are cut" in loads_where("drop-block@1", SHARED)
    assert "torchao" in loads_where("quantize:int8", SHARED)
    assert "no smaller" in loads_where("wanda:0.5", SHARED)
    assert loads_where("drop-experts:0.25", SHARED) == "fewer experts: plain transformers loads it, smaller"
    both = loads_where("drop-mlp@1+quantize:int4", SHARED)
    assert both == f"{loads_where('drop-mlp@1', SHARED)}; {loads_where('quantize:int4', SHARED)}"


@pytest.fixture(scope="module")
def for_servers() -> Model:
    """A model that the layout nemotron-nas can express."""
    return wrap(transformers.LlamaForCausalLM(transformers.LlamaConfig(**(COMMON | {"intermediate_size": 256}))))


def test_what_servers_leave_out(for_servers: Model) -> None:
    for recipe in ("drop-mlp@0", "drop-attention@1,3", "drop-sublayers@a0,m0"):
        assert "--format nemotron-nas" in loads_where(recipe, for_servers)


@pytest.mark.parametrize("recipe", ["drop-attention@0", "drop-mlp@1+quantize:int8"])
def test_a_layout_that_prune_refuses_is_not_advised(for_servers: Model, recipe: str) -> None:
    assert "nemotron-nas" not in loads_where(recipe, for_servers)


# --------------------------------------------------------------------------- whole runs


class Recorded(AnswerCache):
    """A ledger that the tests can look at."""

    last: "Recorded"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        Recorded.last = self


@pytest.fixture(scope="module")
def undisturbed(dense: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Advice, int]:
    """(advice, number of questions) of a whole search."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advise_module, "AnswerCache", Recorded)
        found = advise(dense, USE, tmp_path_factory.mktemp("advice") / "search", **ASKED)
    return found, Recorded.last.asked


def copied(undisturbed: tuple[Advice, int], target: Path, wanted: Callable[[dict[str, Any]], bool]) -> Path:
    """A search folder with those of the answers whose question is wanted."""
    (target / "answers").mkdir(parents=True)
    source = undisturbed[0].folder.parent
    shutil.copy(source / "advice.json", target)
    for path in (source / "answers").iterdir():
        if wanted(json.loads(path.read_text(encoding="utf-8"))["question"]):
            shutil.copy(path, target / "answers")
    return target


def lasting(advice: Advice) -> dict[str, Any]:
    return {name: value for name, value in advice.info.items() if name not in ("created", "seconds", "speeds")}


def test_a_whole_search(undisturbed: tuple[Advice, int], dense: Model) -> None:
    found, asked = undisturbed
    assert asked > 20
    assert {path.name for path in found.folder.iterdir()} == {
        "tried.parquet",
        "held_out.parquet",
        "run.json",
        "report.html",
    }
    assert found.folder.name == USE
    assert {path.name for path in found.folder.parent.iterdir()} == {"advice.json", "answers", USE}
    rows = found.tables["tried"].to_pylist()
    assert {"formats", "masks", "drops", "repaired drops"} <= {row["family"] for row in rows}
    assert len({row["recipe"] for row in rows}) == len(rows)
    for row in rows:
        assert row["keeps"] == (row["loss"] <= 1)
        assert (row["kl"] is None) == (row["family"] not in ("drops", "repaired drops"))
    keeping = [row for row in rows if row["keeps"]]
    assert keeping
    best = max(keeping, key=lambda row: (row["bytes_saved"], row["zeros"], -row["loss"]))
    assert found.recipe == best["recipe"]
    assert found.info["aim"] == {"use": USE, "keep": 0.95, "tasks": ["core_long"], "budget": None}
    assert {row["task"] for row in found.info["scores"]} == set(CORE_TASKS)
    assert [line["use"] for line in found.info["verdicts"]] == list(advise_module.USES)


def test_held_out_prompts_are_those_that_the_search_did_not_read(undisturbed: tuple[Advice, int]) -> None:
    found, _ = undisturbed
    every = [prompt.prompt_id for prompt in prompts()]
    held_out = pq.read_table(found.folder / "held_out.parquet").to_pylist()
    for row in found.info["held_out"]["kl"]:
        own = [one for one in held_out if (one["role"], one["recipe"]) == (row["role"], row["recipe"])]
        assert {one["prompt_id"] for one in own} == set(every[1::2])
        assert row["mean"] == pytest.approx(sum(one["kl"] for one in own) / len(own))
    roles = [row["role"] for row in found.info["held_out"]["kl"]]
    assert roles == ["chosen", "found drop", "cosine", *["random"] * NUM_RANDOM, "repaired"]
    by_role = {row["role"]: row for row in found.info["held_out"]["kl"]}
    pair = found.info["held_out"]["against_cosine"]
    assert (pair["left"], pair["right"]) == (by_role["found drop"]["recipe"], by_role["cosine"]["recipe"])
    assert pair["difference"]["mean"] == pytest.approx(by_role["found drop"]["mean"] - by_role["cosine"]["mean"])
    pair = found.info["held_out"]["against_unrepaired"]
    assert pair["left"].startswith(f"{pair['right']}+repair:linear,rank=")
    assert pair["difference"]["mean"] == pytest.approx(by_role["repaired"]["mean"] - by_role["found drop"]["mean"])
    assert [row["role"] for row in found.info["held_out_use"]] == ["chosen", "runner-up", "cosine, same size"]


def test_advice_opens_again_and_has_its_page(undisturbed: tuple[Advice, int]) -> None:
    found, _ = undisturbed
    page = found.page.read_text(encoding="utf-8")
    assert found.recipe is not None
    assert found.recipe in page
    assert "http" not in page.split("<h1", 1)[1].split("<section", 1)[0]
    again = Advice.open(found.folder)
    assert again.tables == found.tables
    assert again.info == json.loads(json.dumps(found.info))
    assert (again.recipe, again.page) == (found.recipe, found.page)
    assert again._repr_html_() == found._repr_html_()
    assert render_again(found.folder) == page
    with pytest.raises(PrunelensError, match=r"expected an advice folder \(a folder with run.json\)"):
        Advice.open(found.folder.parent)


def test_a_page_that_cannot_be_made_loses_nothing(
    undisturbed: tuple[Advice, int], dense: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = copied(undisturbed, tmp_path / "search", lambda question: True)
    with monkeypatch.context() as patch:
        patch.setattr("prunelens.report.pages.advise.render_advice", lambda run: 1 / 0)
        with pytest.raises(PrunelensError, match=r"the page could not be made \(ZeroDivisionError.*prunelens report"):
            advise(dense, USE, target, **ASKED)
    assert Advice.open(target / USE).tables["tried"].equals(undisturbed[0].tables["tried"])
    assert "<html" in render_again(target / USE)


def test_hostile_names_are_escaped(undisturbed: tuple[Advice, int]) -> None:
    found = undisturbed[0]
    info = copy.deepcopy(found.info)
    info["dense"]["name"], info["aim"]["tasks"], info["notes"] = HOSTILE, [HOSTILE], [HOSTILE]
    for described in (info["chosen"], info["runner_up"], *info["held_out_use"], *info["held_out"]["kl"]):
        described["recipe"] = HOSTILE
    advice = Advice(Run(found.tables, info), found.folder)
    for text in (advice._repr_html_(), render_advice(Run(found.tables, info))):
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert "<script>alert(1)" not in text
        assert "\u202e" not in text
        assert "\x1b" not in text


def test_a_second_call_asks_nothing_new(
    undisturbed: tuple[Advice, int], dense: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, asked = undisturbed
    answers = sorted(path.name for path in (found.folder.parent / "answers").iterdir())
    assert len(answers) == asked
    monkeypatch.setattr(advise_module, "AnswerCache", Recorded)
    again = advise(dense, USE, found.folder.parent, **ASKED)
    assert Recorded.last.asked == 0
    assert again.tables == found.tables
    assert lasting(again) == lasting(found)
    assert sorted(path.name for path in (found.folder.parent / "answers").iterdir()) == answers


def test_a_stopped_search_goes_on(
    undisturbed: tuple[Advice, int], dense: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, asked = undisturbed

    def wanted(question: dict[str, Any]) -> bool:  # what takes long and comes before or after the drops
        masked = question.get("recipe", "").startswith("wanda") or question["ask"] in ("calibration", "ranking")
        return masked or question.get("settings", {}).get("subset") == "held-out"

    folder = copied(undisturbed, tmp_path / "search", wanted)
    known = len(list((folder / "answers").iterdir()))
    whole, steps = Search._damage, []

    def damage(search: Search, drop: Drop, wanted: list[Part]) -> list[float]:
        steps.append(drop)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return whole(search, drop, wanted)

    monkeypatch.setattr(advise_module, "AnswerCache", Recorded)
    with monkeypatch.context() as patch:
        patch.setattr(Search, "_damage", damage)
        with pytest.raises(KeyboardInterrupt):
            advise(dense, USE, folder, **ASKED)
    stopped = Recorded.last.asked
    assert stopped > 5
    assert not (folder / USE).exists()
    again = advise(dense, USE, folder, **ASKED)
    assert known + stopped + Recorded.last.asked == asked
    assert again.tables == found.tables
    assert lasting(again) == lasting(found)
    assert not list(folder.rglob(".*"))


def test_a_budget_that_ends_with_the_dense_tasks(dense: Model, tmp_path: Path) -> None:
    with pytest.raises(PrunelensError) as error:
        advise(dense, USE, tmp_path / "search", budget=1e-6, limit=2, long_tokens=4)
    assert "the budget of 1e-06 minutes" in str(error.value)
    assert str(tmp_path / "search") in str(error.value)
    answers = list((tmp_path / "search" / "answers").iterdir())
    assert len(answers) == 2  # the dense model's texts, and what it does on the tasks
    assert not (tmp_path / "search" / USE).exists()
    found = advise(dense, USE, tmp_path / "search", budget=1e-6, limit=2, long_tokens=4)  # nothing is asked again
    assert found.recipe is None
    assert found.tables["tried"].num_rows == found.tables["held_out"].num_rows == 0
    assert [note for note in found.info["notes"] if "the budget of 1e-06 minutes ended the search" in note]
    assert "Nothing that was tried keeps 95 %" in found.page.read_text(encoding="utf-8")
    assert "Nothing that was tried" in found._repr_html_()


def test_a_budget_that_ends_in_the_search_leaves_time_to_check(
    undisturbed: tuple[Advice, int], dense: Model, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wanted(question: dict[str, Any]) -> bool:
        known = ("texts", "calibration", "ranking", "held-out kl")
        return question["ask"] in known or question.get("settings", {}).get("subset") == "held-out"

    folder = copied(undisturbed, tmp_path / "search", wanted)
    measure = TaskRunner.measure

    def slow(runner: TaskRunner, label: str, variant: Variant) -> Any:
        clock.now += 30 if runner.settings.subset == "search" else 0
        return measure(runner, label, variant)

    monkeypatch.setattr(TaskRunner, "measure", slow)
    found = advise(dense, USE, folder, budget=1.2, **ASKED)
    tried = found.tables["tried"].to_pylist()
    assert [row["recipe"] for row in tried] == ["quantize:int8", "quantize:int4"]  # the second began before 46.8 s
    assert clock.now == FIRST_SECONDS + 60
    assert found.recipe == "quantize:int8"
    assert [line["use"] for line in found.info["verdicts"]] == list(advise_module.USES)
    assert [note for note in found.info["notes"] if "the budget of 1.2 minutes ended the search" in note]


def test_items_at_chance_after_the_search_are_a_note(
    undisturbed: tuple[Advice, int], dense: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(undisturbed, tmp_path / "search", lambda question: True)
    whole, held_out = loss_of, TaskSettings(limit=4, subset="held-out", long_tokens=12)
    names = {prompt.prompt_id for prompt in TaskRunner(dense, parse_tasks("core_long"), held_out).long_task.prompts}

    def at_chance(aim: Goal, left: list[MetricScores], right: list[MetricScores]) -> tuple[float, str]:
        if names & left[0].values.keys():
            raise PrunelensError("the dense model is at chance")
        return whole(aim, left, right)

    monkeypatch.setattr(validate_module, "loss_of", at_chance)
    found = advise(dense, USE, folder, **ASKED)
    assert found.recipe == undisturbed[0].recipe
    assert found.info["held_out_use"] == []
    assert [note for note in found.info["notes"] if "the dense model is at chance" in note]
    assert found.tables == undisturbed[0].tables


def test_a_use_at_chance_is_refused_and_leaves_nothing(dense: Model, tmp_path: Path) -> None:
    with pytest.raises(PrunelensError, match=r"at chance on every task for short-generation.*--tasks"):
        advise(dense, "short-generation", tmp_path / "search", tasks="core_copy", limit=2)
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"use": "long-generatoin"}, r"expected a use of .*did you mean long-generation\?"),
        ({"use": ""}, "expected a use"),
        ({"keep": 0.49}, "--keep from 0.5 to 1, found 0.49"),
        ({"keep": 1.0}, "--keep"),
        ({"keep": float("nan")}, "--keep"),
        ({"budget": 0.0}, "--budget of more than 0 minutes"),
        ({"budget": -1.0}, "--budget"),
        ({"budget": float("nan")}, "--budget"),
        ({"tasks": "core_chioce"}, r"did you mean core_choice\?"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": "core_long,core_long"}, "twice"),
    ],
)
def test_bad_input_is_refused_before_a_model_opens(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with pytest.raises(PrunelensError, match=words):
        advise("there is no such model", **({"use": USE, "folder": tmp_path / "search"} | given))
    assert not (tmp_path / "search").exists()


def test_bad_settings_and_folders_are_refused(dense: Model, tmp_path: Path) -> None:
    with pytest.raises(PrunelensError, match="--limit of at least 2"):
        advise(dense, USE, tmp_path / "search", limit=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    for folder in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(PrunelensError, match="exists and is not a search"):
            advise(dense, USE, folder)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert (tmp_path / "mine" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_texts_that_are_too_few_for_the_tolerance_are_remarked() -> None:
    loops = Metric("core_long", "loops", "long-generation", better="lower", decides="loops")
    dense = [MetricScores(loops, {str(item): 0.0 for item in range(18)})]
    (said,) = coarse(Goal("long-generation", 0.95), dense)
    assert "one text of 18 is 5.6 points" in said
    assert "tolerance of 5:" in said
    assert coarse(Goal("long-generation", 0.9), dense) == []
    assert coarse(Goal("long-generation", 0.95), []) == []
