"""Studies in YAML: what they expand to, what is refused and how it is said, and what the key of a cell depends on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunelens.errors import PrunelensError
from prunelens.models.opening.fingerprint import identify
from prunelens.study.compare.settings import Settings
from prunelens.study.evaluate.measure import TaskSettings
from prunelens.study.evaluate.verdict import Thresholds
from prunelens.study.sweep.study_file import Asking, Cell, Comparing, Study, cells_of, key_of, parse_study, read_study
from prunelens.tasks.suite import USES

HEAD = "model: smollm2\n"
BASE = HEAD + "recipes: [drop-attention:1]\n"
FULL = """
model: some/model
recipes:
  - drop-attention: [1, 2, 4]
  - wanda: [0.5, '2:4']
  - drop-block:2,consecutive
  - {drop-mlp: [3], quantize: [int8, int4]}
  - drop-attention@3,1+magnitude:0.3
seeds: [0, 7]
tasks: {multiple-choice: [core_choice], short-generation: [core_facts, core_copy]}
compare: {prompts: mine.jsonl, num_prompts: null, temperature: 0.5}
evaluate: {limit: 20, pooling: lasttoken}
thresholds: {safe: 0.9, broken_nll: 1}
calibration: texts.txt
dtype: bfloat16
device: cuda:1
trust_remote_code: true
"""


def read(text: str, tmp_path: Path) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return read_study(path)


def refused(text: str, tmp_path: Path) -> str:
    with pytest.raises(PrunelensError) as error:
        read(text, tmp_path)
    assert "\n" not in str(error.value)
    return str(error.value)


def made(**changed: Any) -> Study:
    return parse_study({"model": "smollm2", "recipes": ["drop-attention:1"]} | changed)


# --------------------------------------------------------------------------- reading


def test_a_small_study_has_defaults(tmp_path: Path) -> None:
    found = read(BASE, tmp_path)
    assert found == Study(model="smollm2", recipes=("drop-attention:1",))
    assert (found.seeds, found.tasks, found.compare, found.evaluate) == ((0,), "core", Comparing(), Asking())
    assert found.thresholds == Thresholds()
    assert found == made()


def test_everything_that_a_study_says(tmp_path: Path) -> None:
    found = read(FULL, tmp_path)
    assert found.recipes == (
        "drop-attention:1",
        "drop-attention:2",
        "drop-attention:4",
        "wanda:0.5",
        "wanda:2:4",
        "drop-block:2,consecutive",
        "drop-mlp:3",
        "quantize:int8",
        "quantize:int4",
        "drop-attention@3,1+magnitude:0.3",
    )
    assert (found.model, found.seeds, found.calibration) == ("some/model", (0, 7), "texts.txt")
    assert (found.dtype, found.device, found.trust_remote_code) == ("bfloat16", "cuda:1", True)
    assert found.tasks == {"multiple-choice": ["core_choice"], "short-generation": ["core_facts", "core_copy"]}
    assert found.compare == Comparing(prompts="mine.jsonl", num_prompts=None, temperature=0.5)
    assert found.compare.settings(7) == Settings(
        max_new_tokens=found.compare.max_new_tokens,
        temperature=0.5,
        seed=7,
        lens_steps=found.compare.lens_steps,
        anchors=(),
    )
    assert found.evaluate.settings(7) == TaskSettings(limit=20, pooling="lasttoken", seed=7)
    assert found.thresholds == Thresholds(safe=0.9, broken_nll=1)


def test_parts_can_be_left_out(tmp_path: Path) -> None:
    assert read(BASE + "tasks: null\n", tmp_path).tasks is None
    assert read(BASE + "compare: null\n", tmp_path).compare is None


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:2"])
def test_patterns_without_quotes(pattern: str, tmp_path: Path) -> None:
    """YAML 1.1 takes 2:4 for 2·60 + 4; here it is the pattern, as in YAML 1.2."""
    assert read(HEAD + f"recipes: [wanda: [0.5, {pattern}]]\n", tmp_path).recipes == ("wanda:0.5", f"wanda:{pattern}")
    assert read(HEAD + f"recipes: [wanda: ['{pattern}']]\n", tmp_path).recipes == (f"wanda:{pattern}",)
    assert read(HEAD + f"recipes: ['wanda:{pattern}']\n", tmp_path).recipes == (f"wanda:{pattern}",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # unknown keys
        (BASE + "taks: core\n", ["'taks'", "did you mean tasks?", "thresholds"]),
        (BASE + "seed: [1]\n", ["'seed'", "did you mean seeds?"]),
        (BASE + "compare: {max_new_token: 3}\n", ["'compare.max_new_token'", "did you mean max_new_tokens?"]),
        (BASE + "compare: {seed: 3}\n", ["'compare.seed'", "known keys: prompts, num_prompts"]),
        (BASE + "evaluate: {poling: mean}\n", ["'evaluate.poling'", "did you mean pooling?", "long_tokens"]),
        (BASE + "thresholds: {saef: 0.9}\n", ["'thresholds.saef'", "did you mean safe?", "broken_loops"]),
        # what has to be there
        ("recipes: [drop-attention:1]\n", ["'model'", "missing"]),
        (HEAD, ["'recipes'", "missing"]),
        (HEAD + "recipes: []\n", ["recipes", "at least 1"]),
        (HEAD + "recipes:\n", ["list of recipes"]),
        (HEAD + "recipes: drop-attention:1\n", ["list of recipes"]),
        (BASE + "seeds: []\n", ["seeds", "at least 1"]),
        (BASE + "tasks: null\ncompare: null\n", ["neither tasks nor compare"]),
        # recipes and strengths
        (HEAD + "recipes: [wanda: []]\n", ["list of strengths for wanda", "[]"]),
        (HEAD + "recipes: [wanda: 0.5]\n", ["list of strengths for wanda", "0.5"]),
        (HEAD + "recipes: [wanda: [true]]\n", ["strength", "true"]),
        (HEAD + "recipes: [wanda: [[1]]]\n", ["strength", "a list"]),
        (HEAD + "recipes: [4]\n", ["expected a recipe", "4"]),
        (HEAD + "recipes: [{}]\n", ["expected a recipe", "{}"]),
        (HEAD + "recipes: [null]\n", ["expected a recipe", "null"]),
        (HEAD + "recipes: [drop-atention:1]\n", ["drop-atention:1", "drop-attention"]),
        (HEAD + "recipes: [drop-attention: [-1]]\n", ["drop-attention:-1"]),
        (HEAD + "recipes: [drop-attention: [4, 2, 4]]\n", ["recipe drop-attention:4", "twice"]),
        (HEAD + "recipes: [drop-attention:4, drop-attention: [2, 4]]\n", ["recipe drop-attention:4", "twice"]),
        (HEAD + "recipes: [wanda:0.5, 'wanda:0.50']\n", ["recipe wanda:0.5", "twice"]),
        (BASE + "seeds: [3, 1, 3]\n", ["seed 3", "twice"]),
        # tasks
        (BASE + "tasks: {multiple-choise: [core_choice]}\n", ["did you mean multiple-choice?", *USES]),
        (BASE + "tasks: {multiple-choice: []}\n", ["multiple-choice", "no task"]),
        (BASE + "tasks: {retrieval: [core_choice], multiple-choice: [core_choice]}\n", ["core_choice", "twice"]),
        (BASE + "tasks: core_chioce\n", ["did you mean core_choice?"]),
        (BASE + "tasks: []\n", ["at least one task"]),
        # values
        (BASE + "thresholds: {safe: 0.5}\n", ["broken below safe", "0.8 and 0.5"]),
        (BASE + "thresholds: {safe: 1.5}\n", ["thresholds.safe"]),
        (BASE + "compare: {num_prompts: 0}\n", ["compare.num_prompts"]),
        (BASE + "compare: {max_new_tokens: 0}\n", ["max-new-tokens"]),
        (BASE + "compare: {temperature: 0}\n", ["temperature"]),
        (BASE + "evaluate: {limit: 1}\n", ["limit"]),
        (BASE + "evaluate: {pooling: max}\n", ["pooling", "'max'"]),
        (BASE + "seeds: [-1]\n", ["seed", "-1"]),
        (BASE + "compare: true\n", ["compare"]),
        (BASE + "evaluate: null\n", ["evaluate"]),
        ("model: 3\nrecipes: [drop-attention:1]\n", ["model", "string"]),
        (BASE + "1: 2\n", ["expected text as a key", "'1'", "study.yaml:3"]),
    ],
)
def test_what_is_refused(text: str, words: list[str], tmp_path: Path) -> None:
    found = refused(text, tmp_path)
    assert all(word in found for word in words), found


def test_a_key_far_from_all_gets_no_guess(tmp_path: Path) -> None:
    found = refused(BASE + "zzzz: 1\n", tmp_path)
    assert "did you mean" not in found
    assert "known keys: model, recipes, seeds" in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["nothing"]),
        ("# only a remark\n", ["nothing"]),
        ("- model: a\n- recipes: b\n", ["list"]),
        ("drop-attention:1", ["str"]),
        ("model: [1\nrecipes: 2\n", ["YAML"]),
        ("model: a\nrecipes:\n\t- x\n", ["YAML"]),
        ("model: !!python/object/apply:os.getcwd []\n", ["YAML"]),
    ],
)
def test_what_is_no_study(text: str, words: list[str], tmp_path: Path) -> None:
    found = refused(text, tmp_path)
    assert str(tmp_path / "study.yaml") in found
    assert all(word in found for word in words), found


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("model: Übung\n".encode("latin-1"))
    for name in ("none.yaml", "latin.yaml", "."):
        with pytest.raises(PrunelensError, match="expected a study in YAML at"):
            read_study(tmp_path / name)


def test_negative_seeds_of_tasks_alone(tmp_path: Path) -> None:
    assert "seed" in refused(BASE + "seeds: [-1]\ncompare: null\n", tmp_path)


def test_a_class_followed_by_nothing(tmp_path: Path) -> None:
    assert "multiple-choice" in refused(BASE + "tasks: {multiple-choice: }\n", tmp_path)


# --------------------------------------------------------------------------- cells


def cells(study: Study, fingerprint: str = "f", texts: str = "t") -> list[Cell]:
    return cells_of(study, fingerprint, texts)


def test_a_cell_for_each_recipe_and_seed(tmp_path: Path) -> None:
    study = made(recipes=[{"drop-attention": [1, 2]}, "wanda:0.50"], seeds=[5, 3])
    found = cells(study)
    names = ["drop-attention:1", "drop-attention:2", "wanda:0.5"]
    assert [(cell.recipe, cell.seed) for cell in found] == [(name, seed) for name in names for seed in (5, 3)]
    assert len({cell.key for cell in found}) == 6
    assert all(len(cell.key) == 16 and set(cell.key) <= set("0123456789abcdef") for cell in found)
    assert found == cells(study)


KEY_CHANGES = [
    {"recipes": ["drop-attention:2"]},
    {"recipes": ["drop-mlp:1"]},
    {"recipes": ["drop-attention@1"]},
    {"seeds": [1]},
    {"tasks": "core_choice"},
    {"tasks": None},
    {"compare": None},
    {"compare": {"max_new_tokens": 49}},
    {"compare": {"temperature": 0.9}},
    {"compare": {"batch_size": 31}},
    {"compare": {"chat_template": False}},
    {"compare": {"lens_steps": 1}},
    {"evaluate": {"limit": 9}},
    {"evaluate": {"batch_size": 31}},
    {"evaluate": {"chat_template": True}},
    {"evaluate": {"long_tokens": 255}},
    {"evaluate": {"pooling": "lasttoken"}},
    {"dtype": "float64"},
    {"device": "cpu"},
]


def test_whatever_makes_a_cell_changes_its_key() -> None:
    """And no two changes come to the same."""
    found = [cells(made(), *given) for given in (("f", "t"), ("g", "t"), ("f", "u"), ("t", "f"))]
    found += [cells(made(**changed)) for changed in KEY_CHANGES]
    keys = [cell.key for (cell,) in found]
    assert len(set(keys)) == len(keys) == len(KEY_CHANGES) + 4


@pytest.mark.parametrize(
    "changed",
    [
        {"recipes": [{"drop-attention": [1]}]},
        {"recipes": [" drop-attention:1 "]},
        {"seeds": (0,)},
        {"tasks": ["core"]},
        {"compare": {}},
        # these reach the key through the hash of the texts and of the model's files
        {"compare": {"prompts": "other.jsonl", "num_prompts": 3}},
        {"calibration": "texts.txt"},
        {"model": "a/copy/of/it"},
    ],
)
def test_what_makes_no_difference_leaves_the_key(changed: dict[str, Any]) -> None:
    assert cells(made(**changed)) == cells(made())


def test_thresholds_make_a_cell_only_where_they_may_end_a_class_early() -> None:
    for asked, alike in (({}, False), ({"all_items": True}, True)):
        plain, strict = (cells(made(evaluate=asked, **given)) for given in ({}, {"thresholds": {"safe": 0.99}}))
        assert (plain == strict) is alike
    assert cells(made(tasks=None)) == cells(made(tasks=None, thresholds={"safe": 0.99}))


def test_one_key_for_one_recipe_however_it_is_written() -> None:
    for first, second in (("drop-attention@2,1", "drop-attention@1,2"), ("magnitude:0.50", "magnitude:.5")):
        assert cells(made(recipes=[first])) == cells(made(recipes=[second]))


def turned(document: Any) -> Any:
    """The same mappings with their keys in the opposite order."""
    if isinstance(document, dict):
        return {key: turned(value) for key, value in reversed(document.items())}
    return document


def test_the_order_of_the_yaml_does_not_matter(tmp_path: Path) -> None:
    document = yaml.safe_load(FULL)
    document["tasks"] = ["core_choice", "core_facts"]
    first = parse_study(document)
    text = yaml.safe_dump(turned(document), sort_keys=False)
    assert text.startswith("trust_remote_code")
    second = read(text, tmp_path)
    assert cells(first) == cells(second)
    # more recipes or seeds, or others before them, leave the keys of those that stay
    document |= {"recipes": ["drop-mlp:9", *document["recipes"][::-1]], "seeds": [11, 7, 0]}
    more = {(cell.recipe, cell.seed): cell.key for cell in cells(parse_study(document))}
    assert {(cell.recipe, cell.seed): cell.key for cell in cells(first)}.items() <= more.items()


def test_a_key_depends_on_content_alone() -> None:
    assert key_of({"a": 1, "b": {"c": (1, 2), "d": None}}) == key_of({"b": {"d": None, "c": [1, 2]}, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": "1"})
    assert key_of({"a": [1, 2]}) != key_of({"a": [2, 1]})


def test_the_class_of_a_task_changes_the_key() -> None:
    """A cell's scores carry the class: found again under another one, they would be judged by the old one."""
    short, long = (made(tasks={use: ["core_facts"]}) for use in ("short-generation", "long-generation"))
    assert cells(short) != cells(long)


def test_the_files_of_a_model_name_its_cells(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy has the same name; other weights, or another configuration, have not."""
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path / "cache"))
    first = identify(str(checkpoint))
    assert identify(str(checkpoint)) == first
    copies = [Path(shutil.copytree(checkpoint, tmp_path / name)) for name in ("same", "config", "weights", "damaged")]
    assert identify(str(copies[0])) == first
    config = json.loads((copies[1] / "config.json").read_text(encoding="utf-8"))
    (copies[1] / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}), encoding="utf-8")
    weights = copies[2] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    names = [first, *(identify(str(folder)) for folder in copies[1:3])]
    assert len({cells(made(), name)[0].key for name in names}) == 3
    for text in ("[]", "{"):
        (copies[3] / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(PrunelensError, match=r"config\.json"):
            identify(str(copies[3]))
