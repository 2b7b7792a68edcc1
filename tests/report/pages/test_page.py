"""The page: from the tables alone, without a network, and with hostile strings that do nothing (in Chromium)."""

import base64
import json
import re
import shutil
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_model, tiny_network, tiny_tokenizer, words
from prunelens.api import compare
from prunelens.models.opening.loading import wrap
from prunelens.report.pages.compare import render_page
from prunelens.report.pages.environment import breakable
from prunelens.results import Comparison
from prunelens.study.compare.summary import texts_of
from prunelens.study.store import Run
from prunelens.tasks.prompts import PromptText

HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">{{7*7}}<b>&amp;"
)
SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "chat_template": False}


def asked(*tokens: int, options: tuple[str, ...] = (), name: str = "p") -> PromptText:
    return PromptText(name, "text", ({"role": "user", "content": words(*tokens)},), options)


def hostile_run() -> Run:
    """A comparison whose model, prompt, label, note and every token are hostile."""
    dense = wrap(tiny_network("llama"), tiny_tokenizer(), HOSTILE)
    other = wrap(tiny_network("llama", seed=1), tiny_tokenizer(), f"other {HOSTILE}")
    other.notes.append(HOSTILE)
    dense.tokenizer.decode = lambda ids, **kwargs: HOSTILE if len(ids) == 1 else f"text {HOSTILE}"
    prompts = [asked(5, 6, options=("w7", "w8"), name=HOSTILE), asked(9, name="second")]
    found = compare(dense, other, "drop-attention:1", prompts=prompts, **SETTINGS)
    return Run(found.tables, found.info)


class _Scripts(HTMLParser):
    """Tags of the page, and the content of its JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def tags_of(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = _Scripts()
    parser.feed(page)
    return parser.tags


def test_a_recipe_goes_on_in_the_next_line_after_its_parts() -> None:
    assert breakable("drop-mlp@1,2+<b>") == "drop-mlp@1,<wbr>2+<wbr>&lt;b&gt;"


def test_foreign_strings_make_no_tags() -> None:
    run = hostile_run()
    tame = compare(tiny_model(), "drop-attention:1", prompts=[asked(5, 6)], **SETTINGS)
    tags = tags_of(render_page(run))
    assert not [attributes for tag, attributes in tags if tag == "img"]
    assert not [attributes for _, attributes in tags if any(name.startswith("on") for name in attributes)]
    assert {tag for tag, _ in tags} - {tag for tag, _ in tags_of(render_page(Run(tame.tables, tame.info)))} <= {
        "em",
        "table",
    }


def test_nothing_comes_from_elsewhere() -> None:
    found = compare(tiny_model(), "drop-attention:1", prompts=[asked(5, 6)], **SETTINGS)
    for tag, attributes in tags_of(render_page(Run(found.tables, found.info))):
        for name in ("src", "href"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:")), (tag, address)


@pytest.mark.parametrize("case", ["one prompt", "one token", "the same model", "several"])
def test_every_run_has_a_page(case: str) -> None:
    dense = tiny_model()
    prompts = [asked(5, 6, 7, name="a"), asked(8, 9, options=("w7", "w8"), name="b")]
    if case == "one prompt":
        found = compare(dense, "drop-mlp:1", prompts=prompts[:1], **SETTINGS)
    elif case == "one token":
        found = compare(dense, "drop-mlp:1", prompts=prompts, max_new_tokens=1, chat_template=False)
    elif case == "the same model":
        found = compare(dense, wrap(tiny_network("llama"), tiny_tokenizer(), "same"), prompts=prompts, **SETTINGS)
    else:
        found = compare(dense, "drop-attention:1", "drop-mlp:1", "drop-block:1", prompts=prompts, **SETTINGS)
    page = render_page(Run(found.tables, found.info))
    assert "<title>" in page
    visible = page.split("</style>")[-1].split("<script")[0]
    assert "nan" not in visible.lower().replace("nanne", "")
    assert all(record["compressed"] in visible for record in found.summary)
    assert found._repr_html_().count("<tr") == 1 + len(found.summary)


def test_the_page_comes_from_the_tables_alone(tmp_path: Path) -> None:
    found = compare(tiny_model(), "drop-attention:1", prompts=[asked(5, 6)], **SETTINGS)
    page = found.report(tmp_path / "run")
    first = page.read_text(encoding="utf-8")
    again = Comparison.open(tmp_path / "run")
    assert render_page(Run(again.tables, again.info)) == first


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("Chromium and its driver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"):
        options.add_argument(flag)
    options.add_argument("--window-size=1300,2000")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_network_conditions(offline=True, latency=0, throughput=0)
    yield driver
    driver.quit()


def opened(browser: Any, page: str, folder: Path) -> None:
    """Open a page and wait until its figures are drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    browser.get(path.as_uri())
    WebDriverWait(browser, 30).until(
        lambda driver: driver.execute_script("return document.documentElement.dataset.figures") == "drawn"
    )


@pytest.mark.browser
@pytest.mark.filterwarnings("default::ResourceWarning")
def test_hostile_strings_do_nothing_in_a_browser(browser: Any, tmp_path: Path) -> None:
    opened(browser, render_page(hostile_run()), tmp_path)
    assert browser.title != "taken"
    assert not browser.execute_script("return document.images.length")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert HOSTILE[:40] in browser.execute_script("return document.querySelector('h1').textContent")
    shown = browser.execute_script("return [...document.querySelectorAll('.token-of')].map(node => node.textContent)")
    assert shown
    assert all("<img src=x" in token for token in shown)


@pytest.mark.browser
@pytest.mark.filterwarnings("default::ResourceWarning")
def test_choosing_and_pointing_work_offline(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    prompts = [asked(5, 6, 7, name="a"), asked(8, 9, options=("w7", "w8"), name="b")]
    found = compare(tiny_model(), "drop-attention:1", "drop-block:2", prompts=prompts, **SETTINGS)
    opened(browser, render_page(Run(found.tables, found.info)), tmp_path)
    assert browser.execute_script("return document.querySelectorAll('.plot .main-svg').length") > 4
    steps = [row for row in found.tables["alternatives"].to_pylist() if row["compressed"] == "drop-block:2"]
    Select(browser.find_element(By.ID, "model")).select_by_visible_text("drop-block:2")
    Select(browser.find_element(By.ID, "prompt")).select_by_index(1)
    tokens = browser.find_elements(By.CSS_SELECTOR, "#tokens .token-of")
    written = texts_of(found.tables, "dense")["b"]["tokens"]
    assert [token.text.strip() for token in tokens] == [token.strip() for token in written]
    browser.execute_script("arguments[0].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))", tokens[2])
    browser.execute_script("arguments[0].dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))", tokens[2])
    detail = browser.find_element(By.ID, "detail").text
    wanted = next(row for row in steps if row["prompt_id"] == "b" and row["step"] == 3)
    assert "Step 3" in detail
    assert wanted["compressed_tokens"][0] in detail
    assert wanted["dense_tokens"][0] in detail
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_payload_is_json_that_a_script_can_read() -> None:
    page = render_page(hostile_run())
    start = page.index('id="texts"')
    content = page[page.index(">", start) + 1 :]
    index = json.loads(content[: content.index("</script>")])
    assert HOSTILE[:40] in index["prompts"]["id"][0] + index["models"][0]
    assert len(pieces_of(page)) == len(index["starts"]) == 1
    assert HOSTILE in pieces_of(page)[0]["tokens"]


def pieces_of(page: str) -> list[dict[str, Any]]:
    """What the page's script unpacks."""
    packed = re.findall(r'<script class="piece" type="text/plain">([A-Za-z0-9+/=]*)</script>', page)
    return [json.loads(zlib.decompress(base64.b64decode(piece), wbits=-15)) for piece in packed]
