"""Drafts in a comparison: measured when asked, explained when not, and stored with the run."""

import json
from pathlib import Path

import pytest

from conftest import tiny_model, words
from prunelens.api import compare
from prunelens.metrics.survival import draft_speedup
from prunelens.results import Comparison
from prunelens.study.compare.drafts import DRAFT_PROMPTS
from prunelens.study.compare.settings import Settings
from prunelens.tasks.prompts import PromptText

NOT_ASKED = "not asked for; --draft measures it"


def asked(count: int) -> list[PromptText]:
    return [PromptText(f"p{row}", "text", ({"role": "user", "content": words(5 + row, 9)},)) for row in range(count)]


def run(family: str = "llama", count: int = 2, **settings: object) -> Comparison:
    return compare(
        tiny_model(family),
        "drop-attention@1",
        tiny_model(family, seed=1),
        prompts=asked(count),
        max_new_tokens=12,
        chat_template=False,
        lens_steps=0,
        **settings,
    )


def test_drafts_are_measured_only_when_asked() -> None:
    assert Settings().draft is False
    found = run()
    assert [record["draft"]["measured"] for record in found.summary] == [None, None]
    assert found.info["nulls"]["draft.measured"] == NOT_ASKED
    assert found.info["settings"]["draft"] is False


@pytest.mark.parametrize("count", [1, DRAFT_PROMPTS + 1])
def test_forecast_and_measurement_stand_side_by_side(count: int, tmp_path: Path) -> None:
    totals: dict[str, int] = {}
    finished: dict[str, int] = {}

    def reporter(stage: str, total: int) -> object:
        totals[stage] = total

        def advance(done: int) -> None:
            finished[stage] = finished.get(stage, 0) + done

        return advance

    found = run(count=count, draft=True, reporter=reporter)
    assert not [name for name in found.info["nulls"] if name.startswith("draft")]
    assert found.info["seconds"]["drafting"] >= 0
    for record in found.summary:
        draft, measured = record["draft"], record["draft"]["measured"]
        assert draft["speedup"] == draft_speedup(draft["acceptance"], draft["cost_ratio"], draft["num_drafted"])
        assert measured["prompts"] == min(count, DRAFT_PROMPTS)
        assert 0 < measured["tokens"] <= 12 * measured["prompts"]
        assert measured["acceptance"] == measured["accepted"] / measured["examined"]
        assert 1 <= measured["tokens_per_dense_call"] <= draft["num_drafted"] + 1
        speed = measured["speedup"]
        assert 0 < speed["low"] <= speed["value"] <= speed["high"]
        ratio = measured["assisted_tokens_per_second"] / measured["plain_tokens_per_second"]
        assert speed["value"] == pytest.approx(ratio)
        stage = f"{record['compressed']} drafts"
        assert totals[stage] == finished[stage] == 2 * 12 * measured["prompts"]
    found.report(tmp_path / "run")
    stored = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["summary"]
    assert stored == found.summary


def test_a_family_that_cannot_be_assisted_says_why() -> None:
    found = run("mamba", draft=True)
    for record in found.summary:
        assert record["draft"]["measured"] is None
        assert "stateful" in found.info["nulls"][f"draft.measured.{record['compressed']}"]
    assert "draft.measured" not in found.info["nulls"]
