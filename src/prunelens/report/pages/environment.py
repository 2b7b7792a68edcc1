"""The templates' environment: autoescaping, the filters for foreign strings, and the theme's colours."""

import jinja2
from markupsafe import Markup, escape

from prunelens.report.figures.drawing import GRID, HALO, HEAT, INK, MUTED, PAPER, ZERO
from prunelens.report.figures.layers import kind_name
from prunelens.report.pages.payload import script_json
from prunelens.report.task_words import why
from prunelens.report.wording import number, setting, shorten, visible

THEME = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper", HALO: "--halo", ZERO: "--zero"} | {
    sentinel: f"--heat-{place}" for place, sentinel in enumerate(HEAT, 1)
}
"""What the figures' sentinels stand for in the style sheet."""


def environment() -> jinja2.Environment:
    """The environment of every page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prunelens.report.pages", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    environment.filters["shorten"] = shorten
    environment.filters["breakable"] = breakable
    environment.filters["number"] = number
    environment.filters["setting"] = setting
    environment.filters["kind_name"] = kind_name
    environment.globals["source"] = _source
    environment.globals["why"] = why
    environment.globals["spec"] = lambda text: Markup(script_json(text))
    return environment


def breakable(recipe: str) -> Markup:
    """A recipe, escaped, that may go on in the next line after each of its steps and indices."""
    return escape(recipe).replace("+", Markup("+<wbr>")).replace(",", Markup(",<wbr>"))


def _source(name: str) -> Markup:
    """The text of a script or style of this package."""
    loader = jinja2.PackageLoader("prunelens.report.pages", "templates")
    return Markup(loader.get_source(jinja2.Environment(), name)[0])
