"""Recipes: strings and YAML parse to the same thing, print back as themselves, and anything else is refused."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from prunelens.errors import PrunelensError
from prunelens.pruning.recipe import Recipe, is_recipe, parse_recipe
from prunelens.pruning.steps.drop import DROPS as METHODS
from prunelens.pruning.steps.drop import DropStep
from prunelens.pruning.steps.mask import MASKS

LAYERS = st.integers(0, 200)
COUNTED = st.fixed_dictionaries({"method": st.sampled_from(METHODS), "count": st.integers(1, 999_999)})
CONSECUTIVE = st.fixed_dictionaries(
    {"method": st.just("drop-block"), "count": st.integers(1, 999_999), "consecutive": st.just(True)}
)
NAMED = st.fixed_dictionaries(
    {
        "method": st.sampled_from([method for method in METHODS if method != "drop-sublayers"]),
        "at": st.lists(LAYERS, min_size=1, max_size=12, unique=True).map(sorted),
    }
)
SUBLAYERS = st.fixed_dictionaries(
    {
        "method": st.just("drop-sublayers"),
        "at": st.lists(st.tuples(LAYERS, st.sampled_from("am")), min_size=1, max_size=12, unique=True).map(
            lambda parts: [f"{kind}{layer_idx}" for layer_idx, kind in sorted(parts)]
        ),
    }
)
ITERATIVE = st.fixed_dictionaries(
    {"method": st.sampled_from(METHODS), "count": st.integers(1, 999_999), "iterative": st.just(True)}
)
SPARSITIES = st.one_of(
    st.integers(1, 999_999_999).map(lambda share: f"{share / 1e9:.9f}".rstrip("0")),
    st.tuples(st.integers(1, 127), st.integers(1, 128))
    .filter(lambda pair: pair[0] < pair[1])
    .map("{0[0]}:{0[1]}".format),
)
MASKED = st.fixed_dictionaries({"method": st.sampled_from(MASKS), "sparsity": SPARSITIES})
EXPERTS = st.fixed_dictionaries(
    {"method": st.just("drop-experts"), "fraction": st.sampled_from([0.25, 0.5, 0.125, 1e-9]), "uniform": st.booleans()}
)
STEPS = st.lists(st.one_of(COUNTED, CONSECUTIVE, ITERATIVE, NAMED, SUBLAYERS, MASKED), min_size=1, max_size=4).flatmap(
    lambda steps: st.tuples(
        st.just(steps),
        st.lists(EXPERTS, max_size=1),
        st.lists(
            st.sampled_from([{"method": "quantize", "to": "int8"}, {"method": "quantize", "to": "int4"}]), max_size=1
        ),
    ).map(lambda parts: [step for part in parts for step in part])
)
"""Steps as a YAML document holds them, indices in order of depth."""


def recipe_of(steps: list[dict[str, Any]]) -> Recipe:
    texts = [step | ({"at": tuple(map(str, step["at"]))} if "at" in step else {}) for step in steps]
    return Recipe.model_validate({"steps": tuple(texts)})


@given(STEPS)
def test_a_recipe_is_what_it_prints(steps: list[dict[str, Any]]) -> None:
    recipe = recipe_of(steps)
    assert parse_recipe(str(recipe)) == recipe
    assert str(parse_recipe(str(recipe))) == str(recipe)
    assert is_recipe(str(recipe))


@given(STEPS)
def test_yaml_means_the_same(tmp_path_factory: pytest.TempPathFactory, steps: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(yaml.safe_dump({"steps": steps}), encoding="utf-8")
    assert parse_recipe(str(path)) == recipe_of(steps)
    assert str(parse_recipe(str(path))) == str(recipe_of(steps))


def test_a_yaml_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(
        "steps:  # vier Blöcke, dann zwei MLP\n"
        "  - {method: drop-block, count: 4, consecutive: true}\n"
        "  - method: drop-mlp\n"
        "    at: [1, 2]\n",
        encoding="utf-8",
    )
    assert parse_recipe(str(path)) == parse_recipe("drop-block:4,consecutive+drop-mlp@1,2")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("drop-attention:8", [DropStep(method="drop-attention", count=8)]),
        ("drop-mlp@3,17", [DropStep(method="drop-mlp", at=("3", "17"))]),
        ("drop-sublayers:8", [DropStep(method="drop-sublayers", count=8)]),
        ("drop-sublayers@m3,a25", [DropStep(method="drop-sublayers", at=("m3", "a25"))]),
        ("drop-block:4,consecutive", [DropStep(method="drop-block", count=4, consecutive=True)]),
        (
            "drop-attention:4+drop-mlp@1",
            [DropStep(method="drop-attention", count=4), DropStep(method="drop-mlp", at=("1",))],
        ),
        (
            "drop-block:4, consecutive + drop-mlp@1, 2",
            [DropStep(method="drop-block", count=4, consecutive=True), DropStep(method="drop-mlp", at=("1", "2"))],
        ),
    ],
)
def test_recipes_of_the_documentation(text: str, steps: list[DropStep]) -> None:
    assert parse_recipe(text) == Recipe(steps=tuple(steps))


@pytest.mark.parametrize(
    "texts",
    [
        ("drop-mlp@1,2", "drop-mlp@2,1", "drop-mlp@01,2", " drop-mlp@1, 2 "),
        ("drop-sublayers@a1,m1,a2", "drop-sublayers@a2,m1,a1"),
        ("wanda:0.5", "wanda:.5", "wanda:0.50"),
        ("wanda:2:4", "wanda: 2:4 ", "wanda:02:04"),
        ("drop-experts:0.25,uniform", "drop-experts:.25, uniform"),
        ("drop-block:2,consecutive+drop-mlp:1", "drop-block:02,consecutive + drop-mlp:1"),
    ],
)
def test_the_same_thing_prints_the_same(texts: tuple[str, ...]) -> None:
    assert {str(parse_recipe(text)) for text in texts} == {texts[0]}


def test_the_order_of_steps_is_kept() -> None:
    assert str(parse_recipe("drop-mlp:1+drop-attention:1")) == "drop-mlp:1+drop-attention:1"
    assert parse_recipe("drop-mlp:1+drop-attention:1") != parse_recipe("drop-attention:1+drop-mlp:1")


@pytest.mark.parametrize(
    ("text", "needed"),
    [("drop-mlp@1", False), ("drop-mlp:1", True), ("drop-mlp@1+drop-block:1", True), ("drop-mlp@1+drop-mlp@2", False)],
)
def test_only_counts_need_a_ranking(text: str, needed: bool) -> None:
    assert parse_recipe(text).needs_ranking is needed


@pytest.mark.parametrize(
    ("text", "calibrated", "only_drops"),
    [
        ("drop-mlp@1", False, True),
        ("drop-mlp:1,iterative", True, True),
        ("magnitude:0.5", False, False),
        ("wanda:2:4", True, False),
        ("drop-mlp@1+sparsegpt:0.5", True, False),
        ("drop-experts:0.25", True, False),
        ("drop-experts:0.25,uniform", False, False),
        ("quantize:int8", False, False),
    ],
)
def test_what_a_recipe_needs(text: str, calibrated: bool, only_drops: bool) -> None:
    recipe = parse_recipe(text)
    assert (recipe.needs_calibration, recipe.only_drops) == (calibrated, only_drops)


@pytest.mark.parametrize(
    ("written", "text"), [("2:4", "2:4"), ("'2:4'", "2:4"), ("4:8", "4:8"), ("0.5", "0.5"), (".5", "0.5")]
)
def test_yaml_knows_no_colons(tmp_path: Path, written: str, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"steps: [{{method: wanda, sparsity: {written}}}]", encoding="utf-8")
    assert str(parse_recipe(str(path))) == f"wanda:{text}"


def test_parts_are_layers_and_kinds_in_order_of_depth() -> None:
    step = parse_recipe("drop-sublayers@m3,a25,a3").steps[0]
    assert step.parts == (("attention", 3), ("mlp", 3), ("attention", 25))
    assert step.kinds == ("attention", "mlp")
    assert parse_recipe("drop-block@7,0").steps[0].parts == (("block", 0), ("block", 7))
    assert parse_recipe("drop-mlp:3").steps[0].parts == ()


BAD = [
    "",
    " ",
    "drop-attention",
    "drop-attention:",
    "drop-attention@",
    "drop-attention:0",
    "drop-attention:-1",
    "drop-attention:+1",
    "drop-attention:1.0",
    "drop-attention:1e2",
    "drop-attention:1000000",
    "drop-attention:8,8",
    "drop-attention:8,consecutive",
    "drop-block:8,consecutive,consecutive",
    "drop-block:consecutive",
    "drop-block@1,consecutive",
    "drop-attention@-1",
    "drop-attention@1-3",
    "drop-attention@a1",
    "drop-attention@1,,2",
    "drop-attention@1,1",
    "drop-attention@1,01",
    "drop-attention@²",
    "drop-attention@٣",
    "drop-attention:٣",
    "drop-sublayers@1",
    "drop-sublayers@A1",
    "drop-sublayers@a1,a1",
    "drop-sublayers@a1,a01",
    "drop-sublayers@a",
    "drop-attention:1+",
    "+drop-attention:1",
    "drop-attention:1++drop-mlp:1",
    "drop-attention:1 drop-mlp:1",
    "drop-attention:1\ndrop-mlp:1",
    "heads:1",
    "wanda",
    "wanda:",
    "wanda@1",
    "wanda:0",
    "wanda:0.0",
    "wanda:1",
    "wanda:1.0",
    "wanda:-0.5",
    "wanda:50%",
    "wanda:4:4",
    "wanda:4:2",
    "wanda:0:4",
    "wanda:2:4:8",
    "wanda:2:4,iterative",
    "sparsegpt:٣:4",
    "magnitude:0.5,0.6",
    "drop-experts:1",
    "drop-experts:0",
    "drop-experts:2",
    "drop-experts:0.25,random",
    "drop-experts:0.25+drop-experts:0.5",
    "drop-experts@1",
    "quantize:int2",
    "quantize:8",
    "quantize:int8+wanda:2:4",
    "drop-attention@1,iterative",
    "drop-block:2,consecutive,iterative",
    "drop-attention :1",
]


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(PrunelensError, match="METHOD:COUNT or METHOD@INDEX"):
        parse_recipe(text)


@pytest.mark.parametrize(
    ("text", "name", "meant"),
    [
        ("drop-atention:1", "drop-atention", "drop-attention"),
        ("Drop-attention:1", "Drop-attention", "drop-attention"),
        ("drop_mlp:1", "drop_mlp", "drop-mlp"),
        ("wnada:2:4", "wnada", "wanda"),
        ("drop-mlp:1+repare:bias", "repare", "repair"),
        ("quantise:int8", "quantise", "quantize"),
    ],
)
def test_a_misspelt_method_is_told_in_one_short_sentence(text: str, name: str, meant: str) -> None:
    with pytest.raises(PrunelensError) as caught:
        parse_recipe(text)
    assert str(caught.value) == f"recipe {text!r}: there is no method {name!r} (did you mean {meant}?)"


def test_a_recipe_has_an_end() -> None:
    steps = "+".join(["magnitude:0.5"] * 10_000)
    for text, said in ((steps, "100,000 characters"), (steps[: 14 * 65 - 1], "at most 64 steps, found 65")):
        with pytest.raises(PrunelensError, match=said) as caught:
            parse_recipe(text)
        assert len(str(caught.value)) < 300
    assert len(parse_recipe(steps[: 14 * 64 - 1]).steps) == 64


def test_a_recipe_of_megabytes_is_told_in_a_short_sentence() -> None:
    for text in ("drop-mlp@" + "1," * 2_000_000, "drop-mlp@" + "7" * 5_000, "x" * 90_000, "drop-mlp:" + "1" * 90_000):
        with pytest.raises(PrunelensError) as caught:
            parse_recipe(text)
        assert len(str(caught.value)) < 1_000


@given(st.text(alphabet=st.sampled_from("drop-atenimlbkcsuv:@,+0123456789 \n."), max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        recipe = parse_recipe(text)
    except PrunelensError:
        return
    assert str(parse_recipe(str(recipe))) == str(recipe)


@given(st.text(max_size=400).filter(lambda text: "\0" not in text))
def test_any_unicode_is_a_recipe_or_not(text: str) -> None:
    assert is_recipe(text) in (True, False)
    with suppress(PrunelensError):
        parse_recipe(text)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"count": 1, "at": ("1",)},
        {"count": 0},
        {"count": -3},
        {"count": True},
        {"count": 1.0},
        {"count": "1"},
        {"at": ()},
        {"at": ("1", "1")},
        {"at": ("a1",)},
        {"at": "12"},
        {"at": 1},
        {"at": ({},)},
        {"count": 1, "consecutive": True},
        {"count": 1, "unknown": 1},
    ],
)
def test_a_step_is_checked_however_it_is_made(values: dict) -> None:
    with pytest.raises(ValidationError):
        DropStep(method="drop-mlp", **values)


def test_a_recipe_is_checked_however_it_is_made() -> None:
    with pytest.raises(ValidationError):
        Recipe(steps=())
    with pytest.raises(ValidationError):
        Recipe(steps=(DropStep(method="drop-mlp", count=1),), more=1)
    with pytest.raises(ValidationError):
        DropStep(method="drop-heads", count=1)
    step = DropStep(method="drop-mlp", count=1)
    with pytest.raises(ValidationError):
        step.count = 2


@pytest.mark.parametrize(
    "text", ["drop-attention:1", "drop-heads:3", "wanda:2:4", "drop-attention", "DROP-MLP:1", "a.yaml", "dir/b.yml"]
)
def test_these_mean_recipes(text: str) -> None:
    assert is_recipe(text)


@pytest.mark.parametrize(
    "text", ["smollm2", "Qwen/Qwen2.5-0.5B", "./model", "/abs/model", "model.gguf", "C:\\models\\x", "gpt2", ""]
)
def test_these_mean_models(text: str) -> None:
    assert not is_recipe(text)


def test_a_folder_that_is_there_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_recipe("drop-attention:1")
    (tmp_path / "drop-attention:1").mkdir()
    assert not is_recipe("drop-attention:1")


def test_a_long_recipe_is_no_path() -> None:
    text = "drop-sublayers@" + ",".join(f"a{layer},m{layer}" for layer in range(500))
    assert is_recipe(text)
    assert len(parse_recipe(text).steps[0].parts) == 1000
    assert str(parse_recipe(text)) == text


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("", "`steps:`"),
        ("[]", "`steps:`"),
        ("3: 4", "text as a key"),
        ("steps: [", "YAML"),
        ("steps: []", "steps"),
        ("steps: {method: drop-mlp, count: 1}", "steps"),
        ("steps: [{method: drop-mlp, count: 1}]\nname: mine", "name"),
        ("steps: [{method: drop-mlp, count: 1}, {method: drop-mlp}]", r"steps\.1"),
        ("steps: [{method: drop-mlp, count: 1, consecutive: maybe}]", r"steps\.0\.consecutive"),
        ("!!python/object/apply:os.getcwd []", "YAML"),
    ],
)
def test_a_bad_document_is_refused_by_the_place(tmp_path: Path, document: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(document, encoding="utf-8")
    with pytest.raises(PrunelensError, match=said) as caught:
        parse_recipe(str(path))
    assert str(path) in str(caught.value)


# --- repairs -----------------------------------------------------------------------------------------------

REPAIRS = (
    "repair:bias",
    "repair:bias,weighted",
    "repair:linear",
    "repair:linear,rank=1",
    "repair:linear,rank=64,weighted",
    "repair:linear,weighted",
    "repair:folded",
    "repair:folded,weighted",
)
AFTER_DROPS = "repair comes after the drops that it repairs"
BEFORE_MASKS = "repair:folded comes before a mask"


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize(
    "form",
    [
        "drop-attention:4+{}",
        "drop-block:4,consecutive+{}",
        "drop-mlp:2,iterative+drop-sublayers@a1,m3+{}",
        "drop-mlp@1+drop-experts:0.25+{}",
        "drop-block@2+{}+wanda:2:4",
        "drop-attention@1+{}+wanda:2:4+drop-experts:0.25+quantize:int8",
    ],
)
def test_a_repair_is_what_it_prints(form: str, repair: str) -> None:
    text = form.format(repair)
    assert str(parse_recipe(text)) == text
    assert is_recipe(text)
    assert str(parse_recipe(text).repair) == repair


@pytest.mark.parametrize("repair", [repair for repair in REPAIRS if "folded" not in repair])
@pytest.mark.parametrize(
    "form", ["magnitude:0.5+drop-block@0+{}", "drop-mlp@1+wanda:2:4+{}", "wanda:2:4+drop-block@2+{}"]
)
def test_what_a_mask_leaves_can_be_repaired_by_a_module(form: str, repair: str) -> None:
    assert str(parse_recipe(form.format(repair))) == form.format(repair)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("fit: bias", "repair:bias"),
        ("fit: bias, rank: null, weighted: false", "repair:bias"),
        ("fit: linear, rank: 64, weighted: true", "repair:linear,rank=64,weighted"),
        ("fit: linear, weighted: true", "repair:linear,weighted"),
        ("fit: folded", "repair:folded"),
    ],
)
def test_yaml_holds_repairs(tmp_path: Path, written: str, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    steps = f"[{{method: drop-attention, count: 4}}, {{method: repair, {written}}}]"
    path.write_text(f"steps: {steps}", encoding="utf-8")
    assert parse_recipe(str(path)) == parse_recipe(f"drop-attention:4+{text}")
    assert str(parse_recipe(str(path))) == f"drop-attention:4+{text}"


@pytest.mark.parametrize("text", ["repair:linear,weighted,rank=4", " repair: linear , rank=04 , weighted "])
def test_the_same_repair_prints_the_same(text: str) -> None:
    assert str(parse_recipe(f"drop-mlp@1+{text}")) == "drop-mlp@1+repair:linear,rank=4,weighted"


def test_a_repair_is_no_drop_and_counts_nothing() -> None:
    recipe = parse_recipe("drop-mlp@1+repair:linear,rank=8,weighted")
    assert recipe.repair is not None
    assert (recipe.repair.fit, recipe.repair.rank, recipe.repair.weighted) == ("linear", 8, True)
    assert (recipe.only_drops, recipe.needs_calibration, recipe.needs_ranking) == (False, False, False)
    assert recipe.drops == parse_recipe("drop-mlp@1").steps
    assert parse_recipe("drop-mlp:1+magnitude:0.5").repair is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("repair:linear", AFTER_DROPS),
        ("magnitude:0.5+repair:bias", AFTER_DROPS),
        ("repair:linear+drop-mlp@1", AFTER_DROPS),
        ("drop-mlp@1+repair:linear+drop-mlp@2", AFTER_DROPS),
        ("drop-mlp@1+repair:bias+repair:linear", "repair is given twice"),
        ("drop-mlp@1+repair:bias+repair:bias", "repair is given twice"),
        ("drop-mlp@1+quantize:int8+repair:bias", "quantize comes last"),
        ("wanda:2:4+drop-block@2+repair:folded", BEFORE_MASKS),
        ("drop-block@2+wanda:2:4+repair:folded", BEFORE_MASKS),
        ("magnitude:0.5+drop-block@2+repair:folded,weighted", BEFORE_MASKS),
        ("sparsegpt:0.5+drop-block@2+repair:folded+wanda:2:4", BEFORE_MASKS),
        ("drop-mlp@1+repair:bias,rank=4", "rank goes with repair:linear only"),
        ("drop-mlp@1+repair:folded,rank=4", "rank goes with repair:linear only"),
        ("drop-mlp@1+repair:linear,rank=0", "the rank must be at least 1, found 0"),
        ("drop-mlp@1+repair:linear,rank=x", "a rank such as repair:linear,rank=64"),
        ("drop-mlp@1+repair:linear,rank=", "a rank such as repair:linear,rank=64"),
        ("drop-mlp@1+repair:linear,rank=-4", "a rank such as repair:linear,rank=64"),
        ("drop-mlp@1+repair:linear,rank=4.0", "a rank such as repair:linear,rank=64"),
        ("drop-mlp@1+repair:linear,rank=٤", "a rank such as repair:linear,rank=64"),
        ("drop-mlp@1+repair:linear,rank=1000000", "a rank such as repair:linear,rank=64"),
        ("drop-mlp@1+repair:linear,rank=4,rank=x", "a rank such as repair:linear,rank=64"),
        ("drop-mlp@1+repair:linear,rank=4,rank=4", "one rank"),
        ("drop-mlp@1+repair:linear,rank=4,rank=8", "one rank"),
        ("drop-mlp@1+repair:linear,heavy", "weighted after a comma"),
        ("drop-mlp@1+repair:linear,rank", "weighted after a comma"),
        ("drop-mlp@1+repair:linear,64", "weighted after a comma"),
        ("drop-mlp@1+repair:linear,", "weighted after a comma"),
        ("drop-mlp@1+repair:linear,weighted,weighted", "weighted after a comma"),
        ("drop-mlp@1+repair:linear,bias", "weighted after a comma"),
        ("drop-mlp@1+repair:cubic", "repair:bias, repair:linear or repair:folded"),
        ("drop-mlp@1+repair:Linear", "repair:bias, repair:linear or repair:folded"),
        ("drop-mlp@1+repair:4", "repair:bias, repair:linear or repair:folded"),
        ("drop-mlp@1+repair:rank=4", "repair:bias, repair:linear or repair:folded"),
        ("drop-mlp@1+repair@3", "repair:…, found 'repair@3'"),
        ("drop-mlp@1+repair:", "METHOD:COUNT"),
        ("drop-mlp@1+repair", "METHOD:COUNT"),
    ],
)
def test_what_is_no_repair_is_refused_in_one_sentence(text: str, said: str) -> None:
    with pytest.raises(PrunelensError) as caught:
        parse_recipe(text)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert ". " not in message
    assert not message.endswith(".")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("fit: cubic", r"steps\.1\.fit"),
        ("rank: 4", r"steps\.1\.fit"),
        ("fit: linear, rank: 0", "at least 1"),
        ("fit: linear, rank: x", r"steps\.1\.rank"),
        ("fit: linear, rank: true", r"steps\.1\.rank"),
        ("fit: linear, rank: 4.0", r"steps\.1\.rank"),
        ("fit: linear, weighted: maybe", r"steps\.1\.weighted"),
        ("fit: linear, at: [1]", r"steps\.1: there is no key 'at'"),
        ("fit: bias, rank: 4", "rank goes with repair:linear only"),
    ],
)
def test_a_bad_repair_in_yaml_is_refused_by_the_place(tmp_path: Path, written: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"steps: [{{method: drop-mlp, count: 1}}, {{method: repair, {written}}}]", encoding="utf-8")
    with pytest.raises(PrunelensError, match=said):
        parse_recipe(str(path))


@pytest.mark.parametrize("weighted", ["", ",weighted"])
def test_a_rank_above_the_hidden_size_is_refused(weighted: str) -> None:
    from conftest import tiny_model
    from prunelens.pruning.apply import check_recipe

    model = tiny_model()
    check_recipe(parse_recipe(f"drop-mlp@1+repair:linear,rank=32{weighted}"), model)
    with pytest.raises(PrunelensError, match="a rank of at most 32, the hidden size of tiny-llama, found 33"):
        check_recipe(parse_recipe(f"drop-mlp@1+repair:linear,rank=33{weighted}"), model)


def test_a_folded_repair_after_a_mask_is_refused_in_yaml_too(tmp_path: Path) -> None:
    path, steps = tmp_path / "recipe.yaml", ["method: drop-block, at: [2]", "method: repair, fit: folded"]
    mask = "method: wanda, sparsity: '2:4'"
    for order, refused in (([mask, *steps], True), ([*steps, mask], False)):
        path.write_text(f"steps: [{', '.join(f'{{{step}}}' for step in order)}]", encoding="utf-8")
        if refused:
            with pytest.raises(PrunelensError, match=BEFORE_MASKS):
                parse_recipe(str(path))
        else:
            assert str(parse_recipe(str(path))) == "drop-block@2+repair:folded+wanda:2:4"
