"""What advice tries of methods from outside: each mask beside wanda, and the order that each ranking gives."""

from typing import Any

from prunelens.models.surgery.drop import NOTHING
from prunelens.pruning.choosing import drop_of
from prunelens.pruning.methods import COSINE, Method, method_named
from prunelens.pruning.plugins import outside
from prunelens.pruning.redundancy import Ranking, rank_redundancy
from prunelens.study.advise.goal import DROPS
from prunelens.study.advise.search import PATIENCE, Search, recipe_of


def try_rankings(search: Search) -> None:
    """Take sublayers out in the order of each ranking from outside, until several sizes in a row do not keep the use.

    The recipes name the parts, so that they need no ranking any more.
    """
    for method in outside("ranking"):
        drop, failed = NOTHING, 0
        order = rank(search, method.name).ordered("attention", "mlp")
        for count, part in enumerate(order[:-1], 1):
            drop |= drop_of([part])
            keeps = search.judge(recipe_of(drop), f"{DROPS} by {method.name}", float(count)).keeps
            failed = 0 if keeps else failed + 1
            if failed == PATIENCE:
                break


def rank(search: Search, by: str = COSINE) -> Ranking:
    """A ranking of all sublayers on the calibration texts, from the ledger or measured now."""
    texts, method = search.texts(), method_named("ranking", by)
    made_with = {"methods": [method.record()]} if method is not None and method.source is not None else {}

    def answer() -> list[Any]:
        advance = search.reporter("ranking sublayers", sum(map(len, texts)))
        found = rank_redundancy(search.dense, texts, advance=advance, by=by)
        return [[*key, score] for key, score in found.scores.items()]

    found = search.answers.ask(search.about | {"ask": "ranking"} | made_with, answer)
    return Ranking({(kind, index): score for kind, index, score in found}, sum(map(len, texts)))


def methods_tried() -> dict[str, list[dict[str, Any]]]:
    """Records under `methods` for run.json; nothing where there are none."""
    found: list[Method] = [*outside("mask"), *outside("ranking")]
    return {"methods": [method.record() for method in found]} if found else {}
