"""The texts of many prompts: every piece holds its prompts, and the page finds and shows any of them."""

import re
from pathlib import Path
from typing import Any

import pytest
from test_page import SETTINGS, asked, browser, opened, pieces_of  # noqa: F401

from conftest import tiny_model
from prunelens import compare
from prunelens.report.pages import payload
from prunelens.report.pages.compare import render_page
from prunelens.report.pages.payload import Texts
from prunelens.study.compare.summary import free_agreement, texts_of
from prunelens.study.store import Run

PROMPTS = 70


@pytest.fixture(scope="module")
def run() -> Run:
    prompts = [asked(5 + number % 60, 9, 3 + number, name=f"p{number}") for number in range(PROMPTS)]
    found = compare(tiny_model(), "drop-attention:1", "drop-block:2", prompts=prompts, **SETTINGS)
    return Run(found.tables, found.info)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "PIECE_TOKENS", 40)


def texts(piece: dict[str, Any], written: dict[str, Any], place: int) -> list[str]:
    return [piece["tokens"][number] for number in written["tokens"][place]]


@pytest.mark.usefixtures("short_pieces")
def test_a_piece_holds_the_texts_and_numbers_of_its_prompts(run: Run) -> None:
    index, pieces = Texts(run).index(), pieces_of(render_page(run))
    assert len(pieces) == len(index["starts"]) > 5
    labels = [record["label"] for record in run.info["compressed"]]
    dense, own = texts_of(run.tables, "dense"), [texts_of(run.tables, label) for label in labels]
    steps = [row for row in run.tables["steps"].to_pylist() if row["trace"] == "greedy"]
    for prompt in (0, 6, 7, 41, PROMPTS - 1):
        number = sum(start <= prompt for start in index["starts"]) - 1
        piece, place = pieces[number], prompt - index["starts"][number]
        key = index["prompts"]["id"][prompt]
        assert key == f"p{prompt}"
        assert piece["text"][place] == run.tables["prompts"]["text"][prompt].as_py()
        assert texts(piece, piece["dense"], place) == dense[key]["tokens"]
        for model, label in enumerate(labels):
            assert texts(piece, piece["free"][model], place) == own[model][key]["tokens"]
            rows = [
                row for row in steps if (row["compressed"], row["trace"], row["prompt_id"]) == (label, "greedy", key)
            ]
            kl = [row["kl_dense_compressed"] for row in rows]
            assert piece["steps"][model]["kl"][place] == pytest.approx(kl, rel=5.1e-3)
            assert piece["steps"][model]["same"][place] == [int(row["same_top1"]) for row in rows]
            assert index["worst"][model][prompt] == pytest.approx(max(kl), rel=5.1e-3)
            assert index["agreed"][model][prompt] == free_agreement(run.tables, label)[key]
            assert alternatives(piece, model, place) == expected(run, label, key)


def alternatives(piece: dict[str, Any], model: int, place: int) -> list[Any]:
    found = []
    for side in ("dense", "compressed"):
        tokens, probs = piece["blocks"][piece["alternatives"][model][side][place]]
        found.append(([[piece["tokens"][number] for number in step] for step in tokens], probs))
    return found


def expected(run: Run, label: str, key: str) -> list[Any]:
    rows = [
        row for row in run.tables["alternatives"].to_pylist() if (row["compressed"], row["prompt_id"]) == (label, key)
    ]
    return [
        ([row[f"{side}_tokens"] for row in rows], [[parts(value) for value in row[f"{side}_probs"]] for row in rows])
        for side in ("dense", "compressed")
    ]


def parts(value: float) -> float:
    """Parts of a thousand; a trace is 0.4."""
    return 0 if value == 0 else float(f"{1000 * value:.0f}") or 0.4


def test_a_run_of_few_tokens_is_one_piece(run: Run) -> None:
    assert Texts(run).index()["starts"] == [0]


def test_a_large_run_shows_fewer_alternatives(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "MANY_ROWS", 100)
    page = render_page(run)
    assert {len(step) for tokens, _ in pieces_of(page)[0]["blocks"] for step in tokens} == {3}
    assert '"fewer":3' in page


@pytest.mark.browser
@pytest.mark.usefixtures("short_pieces")
@pytest.mark.filterwarnings("default::ResourceWarning")
def test_any_prompt_is_found_and_shown(browser: Any, run: Run, tmp_path: Path) -> None:  # noqa: F811
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    opened(browser, render_page(run), tmp_path)
    worst = Texts(run).index()["worst"]

    def listed() -> list[int]:
        options = browser.find_elements(By.CSS_SELECTOR, "#prompt option")
        return [int(option.get_attribute("value")) for option in options]

    assert listed()[0] == max(range(PROMPTS), key=worst[0].__getitem__)
    assert [worst[0][prompt] for prompt in listed()] == sorted(worst[0], reverse=True)
    Select(browser.find_element(By.ID, "order")).select_by_value("asked")
    assert listed() == list(range(PROMPTS))
    browser.find_element(By.ID, "words").send_keys("P41")
    assert listed() == [41]
    dense = texts_of(run.tables, "dense")
    shown = "return [...document.querySelectorAll('.token-of')].map(node => node.textContent)"
    WebDriverWait(browser, 10).until(lambda driver: driver.execute_script(shown) == dense["p41"]["tokens"])
    jump = browser.find_elements(By.CSS_SELECTOR, ".jump")[1]
    prompt, step = int(jump.get_attribute("data-prompt")), int(jump.get_attribute("data-step"))
    browser.execute_script("arguments[0].click()", jump)
    WebDriverWait(browser, 10).until(lambda driver: driver.execute_script(shown) == dense[f"p{prompt}"]["tokens"])
    assert re.match(f"Step {step}:", browser.find_element(By.ID, "detail").text)
    assert prompt in listed()
    browser.find_element(By.ID, "words").clear()
    browser.find_element(By.ID, "words").send_keys("nothing like it")
    assert browser.find_element(By.ID, "listed").text == f"0 of {PROMPTS} prompts"
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.browser
@pytest.mark.filterwarnings("default::ResourceWarning")
def test_few_prompts_need_no_search(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    found = compare(tiny_model(), "drop-attention:1", prompts=[asked(5, 6, name="a"), asked(7, name="b")], **SETTINGS)
    opened(browser, render_page(Run(found.tables, found.info)), tmp_path)
    assert browser.execute_script("return document.getElementById('find').offsetParent") is None
    assert browser.execute_script("return document.querySelectorAll('#prompt option').length") == 2
