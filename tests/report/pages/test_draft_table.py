"""The table of drafts: forecast beside measurement, why they differ, and runs that measured nothing."""

import copy
import html
from typing import Any

import pytest

from conftest import tiny_model, words
from prunelens.api import compare
from prunelens.report.pages.compare import render_page
from prunelens.report.pages.draft import draft_how, draft_rows
from prunelens.report.terminal.compare_full import ROWS
from prunelens.study.store import Run
from prunelens.tasks.prompts import PromptText

MEASURED = {
    "prompts": 3,
    "tokens": 90,
    "examined": 80,
    "accepted": 60,
    "acceptance": 0.75,
    "tokens_per_dense_call": 3.25,
    "cost_ratio": 1.125,
    "check_ratio": 1.5,
    "plain_tokens_per_second": 20.0,
    "assisted_tokens_per_second": 11.0,
    "speedup": {"value": 0.55, "low": 0.5, "high": 0.625},
}
FORECAST = {"acceptance": 0.5, "num_drafted": 4, "cost_ratio": 0.875, "speedup": 0.4306}


@pytest.fixture(scope="module")
def stored() -> Run:
    prompts = [PromptText("p", "text", ({"role": "user", "content": words(5, 6)},))]
    dense, other = tiny_model(), tiny_model(seed=1)
    other.name = "other <i>&"
    found = compare(
        dense, "drop-attention@1", other, prompts=prompts, max_new_tokens=4, chat_template=False, lens_steps=0
    )
    return Run(found.tables, found.info)


@pytest.fixture
def run(stored: Run) -> Run:
    return Run(stored.tables, copy.deepcopy(stored.info))


def measured(run: Run, **more: Any) -> Run:
    run.info["summary"][0]["draft"] = FORECAST | {"measured": MEASURED | more}
    return run


def shown(run: Run) -> str:
    """The section of the page as text."""
    section = render_page(run).split('<section id="draft">')[1].split("</section>")[0]
    return html.unescape(section)


def terminal(run: Run) -> list[str]:
    show = dict(ROWS)["draft speed-up, predicted / measured"]
    return [show(record) for record in run.info["summary"]]


def test_forecast_beside_measurement(run: Run) -> None:
    row = draft_rows(measured(run))[0]
    assert (row.acceptance.predicted, row.acceptance.measured, row.acceptance.below) == ("50.0 %", "75.0 %", "60 of 80")
    assert (row.tokens.predicted, row.tokens.measured) == ("1.94", "3.25")
    assert (row.drafting.predicted, row.drafting.measured) == ("0.875", "1.12")
    assert (row.checking.predicted, row.checking.measured) == ("1", "1.50")
    assert (row.speedup.predicted, row.speedup.measured, row.speedup.below) == ("0.431", "0.550", "[0.500 to 0.625]")
    assert row.sentence == (
        "11.0 tokens a second with the draft, 20.0 without. A round was forecast to give 1.94 tokens for the time of "
        "4.50 dense tokens; it gave 3.25 for 6.00: 4 times 1.12 to draft, and 1.50 to judge 5 positions at once."
    )
    assert "Measured on 3 prompts" in draft_how(run)
    section = shown(run)
    assert "slower than the dense model alone" in section
    assert row.sentence in section
    assert "[0.500 to 0.625]" in section
    assert terminal(run)[0] == "0.43 / 0.55"


def test_texts_too_short_to_take_the_cost_apart(run: Run) -> None:
    row = draft_rows(measured(run, cost_ratio=None, check_ratio=None, acceptance=None, examined=0, accepted=0))[0]
    assert (row.drafting.measured, row.checking.measured, row.acceptance.measured) == ("—", "—", "—")
    assert row.sentence.endswith("too short to tell what a drafted token costs.")


def test_what_was_not_asked_for_can_be_added(run: Run) -> None:
    rows = draft_rows(run)
    assert [row.speedup.measured for row in rows] == ["—", "—"]
    assert "prunelens compare … --draft" in shown(run)
    assert "Measured on" not in shown(run)
    assert all(cell.endswith(" / -") for cell in terminal(run))


def test_a_reason_is_shown_and_escaped(run: Run) -> None:
    run.info["nulls"]["draft.measured.other <i>&"] = "no <script>alert(1)</script> cache"
    page = render_page(run)
    assert "<script>alert(1)" not in page
    assert "other <i>" not in page
    assert "Not measured: no <script>alert(1)</script> cache." in shown(run)


def test_runs_from_before_drafts_were_measured_have_a_page(run: Run) -> None:
    expected = shown(run)
    for record in run.info["summary"]:
        del record["draft"]["measured"]
    del run.info["settings"]["draft"]
    del run.info["nulls"]["draft.measured"]
    assert shown(run) == expected
    assert all(cell.endswith(" / -") for cell in terminal(run))
