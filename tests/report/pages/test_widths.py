"""The page on wide and on narrow screens: nothing lies outside of the window, the answer fits its box."""

from pathlib import Path
from typing import Any

import pytest
from test_page import SETTINGS, asked, browser, opened  # noqa: F401

from conftest import tiny_model
from prunelens import compare
from prunelens.report.pages.compare import render_page
from prunelens.study.store import Run

TOO_WIDE = """
return [...document.querySelectorAll('table.answer')].filter(table => {
  const box = table.parentElement.getBoundingClientRect(), own = table.getBoundingClientRect();
  return own.width > 0 && (own.right > box.right + 1 || table.scrollWidth > table.clientWidth + 1);
}).length
"""
OUTSIDE = """
const loose = [...document.querySelectorAll('#answer *')].filter(node => !node.closest('.hidden') && node.innerText);
const outside = loose.filter(node => node.getBoundingClientRect().right > innerWidth + 1);
return outside.map(node => node.outerHTML.slice(0, 99))
"""


@pytest.mark.browser
@pytest.mark.filterwarnings("default::ResourceWarning")
@pytest.mark.parametrize("width", [1300, 420])
def test_the_page_fits_the_window(browser: Any, tmp_path: Path, width: int) -> None:  # noqa: F811
    prompts = [asked(5, 6, 7, name="a"), asked(8, 9, options=("w7", "w8"), name="b")]
    found = compare(tiny_model(), "drop-attention:1", "drop-attention:2+quantize:int8", prompts=prompts, **SETTINGS)
    size = {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        opened(browser, render_page(Run(found.tables, found.info)), tmp_path)
        browser.execute_script("document.querySelectorAll('details').forEach(node => { node.open = true })")
        assert browser.execute_script("return innerWidth") == width
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script("return document.querySelectorAll('table.answer').length") == 2
        assert browser.execute_script(TOO_WIDE) == 0
        assert browser.execute_script(OUTSIDE) == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
