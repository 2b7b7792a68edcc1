"""The sections on sublayers, attribution and noise: what they say and draw, from made-up traces."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_page import HOSTILE, SETTINGS, asked, browser, hostile_run, opened, tags_of  # noqa: F401

from conftest import tiny_model, tiny_network, tiny_tokenizer
from layer_runs import add_attribution, add_layers, add_noise
from prunelens.api import compare
from prunelens.models.opening.loading import wrap
from prunelens.report.figures.accumulation import _ranges, split_rows
from prunelens.report.figures.attribution import attribution_figure
from prunelens.report.figures.attribution_words import sentences
from prunelens.report.figures.depth import depth_figure
from prunelens.report.figures.drawing import Figure, Panel
from prunelens.report.figures.layers import cell_means, changed_places
from prunelens.report.figures.local import local_figures
from prunelens.report.figures.noise import floor_lines, floor_note, noise_rows, noise_sentence
from prunelens.report.pages.compare import render_page
from prunelens.report.terminal.compare_full import _noise
from prunelens.study.compare.schemas import SCHEMAS
from prunelens.study.rows import by_prompt, rows_of
from prunelens.study.store import Run


def a_run(*compressed: Any, prompts: int = 2) -> Run:
    texts = [asked(5, 6, 7, name="a"), asked(8, 9, name="b")][:prompts]
    found = compare(tiny_model(), *(compressed or ("drop-attention:1", "drop-mlp:1")), prompts=texts, **SETTINGS)
    return Run(dict(found.tables), json.loads(json.dumps(found.info)))


def a_checkpoint() -> Any:
    return wrap(tiny_network("llama", seed=1), tiny_tokenizer(), "other")


def traces(panel: Panel) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(panel.spec)["data"]
    return found


def numbers(values: dict[str, str]) -> np.ndarray:
    """An array as plotly writes it."""
    return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])


def heat_text(figure: Figure) -> list[list[list[str]]]:
    return [traces(panel)[0]["text"] for panel in figure.panels]


def words(figure: Figure) -> str:
    return " ".join((*figure.says, *figure.notes))


CASES = {
    "no lens": lambda run: run,
    "one block": lambda run: add_layers(run, blocks=1),
    "many blocks": lambda run: add_layers(run, blocks=80),
    "one kind": lambda run: add_layers(run, kinds=("attention",)),
    "only mlp": lambda run: add_layers(run, kinds=("mlp",)),
    "one step": lambda run: add_layers(run, steps=(1,)),
    "raw lens": lambda run: add_layers(run, lens="raw"),
    "parallel": lambda run: add_layers(run, parallel=True),
    "attribution": lambda run: add_attribution(add_layers(run, blocks=4)),
    "attribution alone": lambda run: add_attribution(run, changed=(3,)),
    "noise": lambda run: add_noise(add_attribution(add_layers(run, blocks=4))),
}


def emptied(run: Run) -> Run:
    run.tables["layers"] = SCHEMAS["layers"].empty_table()
    run.tables["attribution"] = SCHEMAS["attribution"].empty_table()
    run.info |= {"lens": None, "noise": {}}
    for record in run.info["summary"]:
        record["attribution"] = None
    return run


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_run_has_its_sections(case: str, prompts: int) -> None:
    run = CASES[case](emptied(a_run("drop-attention:1", a_checkpoint(), prompts=prompts)))
    page = render_page(run)
    visible = page.split("</style>")[-1].split('<script id="texts"')[0]
    assert "nan " not in visible.lower()
    assert ("--attribute" in visible) == (len(run.info["summary"]) > 1)
    assert ("switched off (--lens-steps 0)" in visible) == (run.info["lens"] is None)
    assert ("same input: " in visible) == (case == "parallel")
    for anchor in ("local", "depth", "attribution"):
        assert f'<section id="{anchor}">' in visible
        assert f'href="#{anchor}"' in visible


def test_a_run_without_the_new_fields_still_has_a_page() -> None:
    run = emptied(a_run())
    for key in ("lens", "noise"):
        del run.info[key]
    for record in run.info["summary"]:
        del record["attribution"]
    assert "--attribute" in render_page(run)


def test_a_model_that_cannot_be_aligned_says_why() -> None:
    run = emptied(add_layers(a_run(a_checkpoint())))
    run.info["lens"] = {"lens": "normed", "steps": [1], "horizon": 6, "prompts": 2, "parallel": False}
    run.info["nulls"]["layers.other"] = "12 blocks, the dense model has 3 <b>"
    page = render_page(run)
    assert page.count("Not measured: 12 blocks, the dense model has 3 &lt;b&gt;") == 2


def test_cell_means_ignore_what_is_missing() -> None:
    values = np.array([1.0, 3.0, np.nan, 5.0])
    means, counts = cell_means(values, np.array([0, 0, 1, 1]), np.array([0, 0, 0, 2]), (2, 3))
    assert means[0, 0] == 2
    assert means[1, 2] == 5
    assert counts.tolist() == [[2, 0, 0], [0, 0, 1]]
    assert np.isnan(means[1, 0])


def test_heat_maps_show_means_zeros_and_what_is_dropped() -> None:
    run = add_layers(emptied(a_run("drop-attention@1", a_checkpoint())), blocks=3)
    spaces, steps = local_figures(run, 0)
    assert [panel.title for panel in spaces.panels] == ["Attention", "MLP"]
    assert changed_places(run, 0) == {(1, "attention")}
    frames = [json.loads(panel.spec)["layout"].get("shapes", []) for panel in spaces.panels]
    assert [(frame["x0"], frame["x1"]) for frame in frames[0]] == [(0.5, 1.5)]
    assert frames[1] == []
    rows = rows_of(run.tables["layers"], trace="dropped", layer_idx=1, sublayer="mlp").to_pylist()
    mean = np.mean([row["kl_dense_compressed"] for row in rows])
    assert f"{mean:.3g}"[:5] in traces(spaces.panels[1])[1]["text"][0][1]
    first = [row["kl_dense_compressed"] for row in rows if row["step"] == 1]
    assert f"{np.mean(first):.3g}"[:5] in heat_text(steps)[1][0][1]
    assert "2 of 6 steps, 2 prompts" in words(spaces)
    own = local_figures(run, 1)[0]
    assert changed_places(run, 1) == {(block, kind) for block in range(3) for kind in ("attention", "mlp")} - {
        (0, "attention")
    }
    assert "exactly 0" in heat_text(own)[0][0][0]
    assert "exactly 0" not in heat_text(own)[0][0][1]
    assert any(key.name == "exactly 0" for key in own.keys)
    assert not any(key.name == "exactly 0" for key in spaces.keys)


def test_missing_kinds_are_not_computed() -> None:
    run = add_layers(emptied(a_run("drop-attention@1")), blocks=2)
    rows = run.tables["layers"]
    keep = [not (row["layer_idx"] == 0 and row["sublayer"] == "mlp") for row in rows.to_pylist()]
    run.tables["layers"] = rows.filter(keep)
    assert "not computed" in heat_text(local_figures(run, 0)[0])[1][0][0]


def test_depth_begins_where_the_models_part() -> None:
    run = add_noise(add_layers(emptied(a_run("drop-mlp@1", "drop-block@0")), blocks=3))
    figure = depth_figure(run, 0)
    assert len(figure.panels) == 4
    median = next(trace for trace in traces(figure.panels[1]) if trace["name"] == "median")
    assert median["text"][0] == "MLP of block 1"
    assert "Before the MLP of block 1, the first sublayer that is changed, every value is exactly 0" in words(figure)
    assert "Before the" not in words(depth_figure(run, 1))
    assert "same shape: 0, bit-equal" in words(figure)
    assert "below the axis" in words(figure)
    alike = add_layers(emptied(a_run("drop-mlp@1")), blocks=3)
    alike.info["compressed"][0]["dropped"] = {"mlp": [9]}
    alike = add_layers(alike, blocks=3)
    assert all("exactly 0" in panel.empty for panel in depth_figure(alike, 0).panels)


def test_attribution_says_what_the_numbers_say() -> None:
    run = add_attribution(add_layers(emptied(a_run()), blocks=4), blocks=8)
    figure = attribution_figure(run, 0)
    assert figure is not None
    said = words(figure)
    assert "ratio 2.00: together they do more damage than one by one" in said
    assert "8 attention sublayers: Spearman ρ 0.80, cosine orders them much as the damage does" in said
    assert "Of the 2 most redundant by cosine, 2 are among the 2 that do least damage" in said
    assert "The rest (embedding, final norm and head) alone: 0.100 nats" in said
    assert len(figure.panels) == 2
    kept, changed, saved = traces(figure.panels[0])[:3]
    assert [len(trace["text"]) for trace in (kept, changed)] == [6, 2]
    bars = next(trace for trace in traces(figure.panels[0]) if trace["type"] == "bar")
    means = np.concatenate([numbers(kept["y"]), numbers(changed["y"])])
    assert np.sort(bars["base"] + numbers(bars["y"])) == pytest.approx(np.sort(means))
    steps = rows_of(run.tables["steps"], compressed="drop-attention:1", trace="greedy")
    whole = [values for _, values in by_prompt(steps, "kl_dense_compressed")]
    gain = np.concatenate(whole).mean() - 0.05
    assert ("saves nothing" in said) == (gain <= 0)
    assert len(saved["text"]) == (2 if gain > 0 else 0)


@pytest.mark.parametrize(
    ("rho", "expected"),
    [(0.9, "much as"), (0.5, "partly as"), (0.1, "says little"), (-0.9, "against the damage"), (None, "tied")],
)
def test_correlation_is_never_prettier_than_it_is(rho: float | None, expected: str) -> None:
    run = add_attribution(emptied(a_run()), rho=0.0)
    record = run.info["summary"][0]["attribution"]
    record["rank_correlation"]["attention"]["rho"] = rho
    record |= {"additivity": None}
    said = sentences(record, [part for part in record["parts"] if part["sublayer"] != "rest"])
    assert expected in said[-1]
    assert "nothing to add up" in said[0]


def test_noise_floor_stretches_no_axis() -> None:
    info = {"noise": {"a": {"tv": {"mean": 1e-12, "p95": 3e-12, "max": 1e-11}}}}
    log = {"type": "log", "range": [-4, 0]}
    assert floor_lines(info, "tv", (0.0, 1.0), log) == []
    assert "TV 3.0 × 10⁻¹² (below the axis)" in floor_note(info, {"TV": "tv"}, log)
    info["noise"]["a"]["tv"]["p95"] = 1e-2
    assert [trace["y"][0] for trace in floor_lines(info, "tv", (0.0, 1.0), log)] == [1e-2]
    info["noise"]["a"]["tv"]["p95"] = 3.0
    assert "under the noise" in floor_note(info, {"TV": "tv"}, log)
    assert floor_lines(info, "kl_dense_compressed", (0.0, 1.0), log) == []
    assert floor_note({}, {"TV": "tv"}, log) == ""


def test_noise_table_says_bit_equal() -> None:
    run = add_noise(emptied(a_run()))
    rows = noise_rows(run.info)
    assert len(rows) == 18
    assert {row.mean for row in rows if row.against == "same shape" and row.quantity != "same top-1"} == {
        "0, bit-equal"
    }
    assert "same shape: 0, bit-equal" in noise_sentence(run.info)
    assert noise_sentence({"noise": {}}) == ""


def test_a_sampled_noise_floor_says_of_how_many_positions_it_is() -> None:
    run = add_noise(emptied(a_run()))
    assert "positions" not in noise_sentence(run.info)
    run.info["noise_sample"] = {"positions": 384, "of": 1241, "texts": 24, "of_texts": 48}
    assert "itself at 384 of 1,241 positions (KL mean)" in noise_sentence(run.info)
    assert "over the same texts at 384 of 1,241 positions, only" in render_page(run)
    assert "itself at 384 of 1,241 positions, another batch shape" in " ".join(_noise(run.info))
    run.info["noise_sample"] |= {"positions": 1241}
    assert "positions" not in noise_sentence(run.info)


def test_the_split_is_the_difference_of_both_means() -> None:
    assert _ranges(48) == [(0, 8), (8, 16), (16, 32), (32, 48)]
    assert _ranges(1) == [(0, 1)]
    assert _ranges(9) == [(0, 8), (8, 9)]
    assert _ranges(0) == []
    run = a_run()
    rows = split_rows(run, 0)
    assert [row.steps for row in rows] == ["1–6"]
    assert rows[0].same.endswith("at step 6")
    free = rows_of(run.tables["steps"], compressed="drop-attention:1", trace="free")["kl_dense_compressed"].to_numpy()
    assert rows[0].together[:4] == f"{free.mean():.3g}"[:4]


@pytest.mark.browser
@pytest.mark.filterwarnings("default::ResourceWarning")
def test_hostile_names_do_nothing_in_the_new_sections(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    run = add_attribution(add_layers(emptied(hostile_run()), blocks=4))
    run.info["noise"] = {HOSTILE: add_noise(run).info["noise"]["bfloat16"]}
    run.info["nulls"][f"layers.{run.info['compressed'][1]['label']}"] = HOSTILE
    page = render_page(run)
    assert not [attributes for tag, attributes in tags_of(page) if tag == "img"]
    opened(browser, page, tmp_path)
    assert browser.title != "taken"
    assert not browser.execute_script("return document.images.length")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert "</script>" in browser.execute_script("return document.querySelector('table.noise').textContent")


@pytest.mark.browser
@pytest.mark.filterwarnings("default::ResourceWarning")
def test_the_sections_follow_the_chosen_model(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    run = add_noise(add_attribution(add_layers(emptied(a_run("drop-attention@1", "drop-mlp@1")), blocks=4)))
    opened(browser, render_page(run), tmp_path)
    shown = "return [...document.querySelectorAll(arguments[0])].filter(node => node.offsetParent).length"
    assert browser.execute_script("return document.querySelectorAll('#local .heatmaplayer image').length") > 0
    assert browser.execute_script(shown, "#local .plot") == 4
    assert browser.execute_script(shown, "#depth .plot") == 4
    assert browser.execute_script(shown, "#attribution .plot") == 2
    assert browser.execute_script("return document.querySelector('#attribution p[data-model]').hidden")
    colours = browser.execute_script(
        "return document.querySelector('#local .plot').data[0].colorscale.map(pair => pair[1])"
    )
    assert not [colour for colour in colours if colour.startswith("#0102")]
    Select(browser.find_element(By.ID, "model")).select_by_visible_text("drop-mlp@1")
    WebDriverWait(browser, 30).until(
        lambda driver: driver.execute_script("return document.documentElement.dataset.figures") == "drawn"
    )
    assert browser.execute_script(shown, "#attribution .plot") == 0
    assert "--attribute" in browser.find_element(By.ID, "attribution").text
    assert "MLP of block 1, which is framed" in browser.find_element(By.ID, "local").text
    assert "Before the MLP of block 1" in browser.find_element(By.ID, "depth").text
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize(("dtype", "told"), [("bfloat16", True), ("float16", True), ("float32", False)])
def test_the_noise_floor_says_that_it_is_of_reading_where_ties_are_near(dtype: str, told: bool) -> None:
    run = add_noise(emptied(a_run()))
    info = run.info | {"dense": run.info["dense"] | {"dtype": dtype}}
    assert (f"What is written in {dtype} may differ with another batch size" in noise_sentence(info)) == told
