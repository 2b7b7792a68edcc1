"""Masks and rankings from outside: how they register, what they are given, what becomes of what they return."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from conftest import shared_network, tiny_model, tiny_network
from prunelens import InputStatistics, PartStates, mask, ranking
from prunelens.errors import PrunelensError
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.shared_copy import shared_copy_of
from prunelens.pruning import methods
from prunelens.pruning.apply import apply
from prunelens.pruning.methods import TAKEN, built_in, registered
from prunelens.pruning.plugins import load_plugin, load_plugins
from prunelens.pruning.pruned import Calibration
from prunelens.pruning.recipe import is_recipe, parse_recipe
from prunelens.pruning.redundancy import rank_redundancy
from prunelens.pruning.sequential import mask_weights
from prunelens.pruning.steps.known import KINDS, known_methods
from prunelens.pruning.steps.mask import MASKS, MaskStep
from prunelens.pruning.values import Pattern

TEXTS = [[5, 9, 33, 71, 8], [4, 90], [17, 3, 3, 60, 61, 62, 88, 12], [20, 44]]


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = methods.snapshot()
    yield
    methods.restore(before)


def write(path: Path, text: str) -> Path:
    path.write_text(f"import prunelens\nimport torch\n{text}", encoding="utf-8")
    return path


# --- names ------------------------------------------------------------------------------------------------


def test_what_prunelens_brings_along() -> None:
    assert built_in("mask") == ("magnitude", "wanda")
    assert built_in("ranking") == ("cosine",)
    assert MASKS == ("magnitude", "wanda", "sparsegpt")
    others = {method for kind in KINDS if kind is not MaskStep for method in kind.methods()}
    assert set(TAKEN) == others | {"sparsegpt"}


@pytest.mark.parametrize(
    "name", ["", "x", "My-mask", "my_mask", "my mask", "-mask", "mask-", "2masks", "m" * 41, "a:b", "müll", "a--b"]
)
def test_names_that_recipes_cannot_say(name: str) -> None:
    for decorate in (mask, ranking):
        with pytest.raises(PrunelensError, match=r"2 to 40 lower-case letters, digits and hyphens \(\[a-z\]"):
            decorate(name)


@pytest.mark.parametrize("name", ["wanda", "magnitude", "sparsegpt", "quantize", "drop-mlp", "drop-experts", "repair"])
def test_names_that_are_taken(name: str) -> None:
    with pytest.raises(PrunelensError, match=f"the name {name} is taken by prunelens; call the mask something else"):
        mask(name)(lambda weight: weight)
    with pytest.raises(PrunelensError, match="the name cosine is taken"):
        ranking("cosine")(lambda part: part.before[:, 0])


def test_a_name_is_registered_once() -> None:
    @mask("my-mask")
    def first(weight: Any) -> Any:
        return weight

    with pytest.raises(PrunelensError, match=rf"my-mask is taken by .*test_methods.py, line {_line_of(first)}"):

        @mask("my-mask")
        def second(weight: Any) -> Any:
            return weight

    assert methods.method_named("mask", "my-mask").function is first


def _line_of(function: Any) -> int:
    return function.__code__.co_firstlineno


def unchecked(function: Any) -> Any:
    """A function as users call it: annotations are checked in tests only."""
    return getattr(function, "__wrapped__", function)


def test_a_decorator_without_brackets_or_on_something_else() -> None:
    def alone(weight: Any) -> Any:
        return weight

    with pytest.raises(PrunelensError, match=r'@prunelens.mask\("name"\) with a name in brackets'):
        unchecked(mask)(alone)
    with pytest.raises(PrunelensError, match="expected a function to decorate, found 'text'"):
        unchecked(mask("my-mask"))("text")
    with pytest.raises(PrunelensError, match="expected per of row, matrix, found 'column'"):
        unchecked(mask)("my-mask", per="column")


@pytest.mark.parametrize(
    ("decorate", "function", "said"),
    [
        (mask, lambda: 0, r"\(weight\) or \(weight, inputs\), found 0"),
        (mask, lambda a, b, c: 0, "found 3"),
        (ranking, lambda: 0, r"one argument \(part\), found 0"),
        (ranking, lambda a, b: 0, r"one argument \(part\), found 2"),
    ],
)
def test_functions_with_other_arguments(decorate: Any, function: Any, said: str) -> None:
    with pytest.raises(PrunelensError, match=said):
        decorate("my-method")(function)


def test_arguments_with_defaults_do_not_count() -> None:
    mask("my-mask")(lambda weight, power=2: weight.abs() ** power)
    assert not methods.method_named("mask", "my-mask").reads_inputs


def test_a_cell_of_a_notebook_may_run_again() -> None:
    cell = "@mask('my-mask')\ndef mine(weight):\n    return weight * {}\n"
    for number in (1, 2):
        exec(
            compile(cell.format(number), f"/tmp/ipykernel_1/{number}.py", "exec"),
            {"mask": mask, "__name__": "__main__"},
        )
    found = methods.method_named("mask", "my-mask")
    assert found.function(torch.ones(1)).item() == 2


# --- recipes ----------------------------------------------------------------------------------------------


def test_recipes_know_the_names() -> None:
    mask("mine2")(lambda weight: weight)
    ranking("my-ranking")(lambda part: part.before[:, 0])
    for text in ("mine2:0.5", "mine2:2:4", "drop-mlp:2,by=my-ranking", "drop-block:2,consecutive,by=my-ranking"):
        assert is_recipe(text)
        assert str(parse_recipe(text)) == text
    assert str(parse_recipe("drop-mlp:2, by=my-ranking , iterative")) == "drop-mlp:2,iterative,by=my-ranking"
    assert str(parse_recipe("drop-mlp:2,by=cosine")) == "drop-mlp:2"
    assert "mine2" in known_methods()
    with pytest.raises(PrunelensError, match="magnitude, wanda, sparsegpt, mine2 with"):
        parse_recipe("mine2:half")


def test_yaml_knows_the_names(tmp_path: Path) -> None:
    mask("mine2")(lambda weight: weight)
    ranking("my-ranking")(lambda part: part.before[:, 0])
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "steps: [{method: drop-mlp, count: 2, by: my-ranking}, {method: mine2, sparsity: 0.5}]", encoding="utf-8"
    )
    assert str(parse_recipe(str(path))) == "drop-mlp:2,by=my-ranking+mine2:0.5"
    path.write_text("steps: [{method: mine3, sparsity: 0.5}]", encoding="utf-8")
    with pytest.raises(PrunelensError, match=r"no method 'mine3' \(did you mean mine2\?\); methods: .*mine2"):
        parse_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("my-mas:0.5", r"there is no method 'my-mas' \(did you mean my-mask\?\)"),
        (
            "drop-mlp:2,by=my-rankin",
            r"there is no ranking 'my-rankin' \(did you mean my-ranking\?\); rankings: cosine",
        ),
        ("drop-mlp:2,by=my-mask", "my-mask is a mask, not a ranking; use it as in my-mask:0.5"),
        ("my-ranking:0.5", "expected a recipe or a model, found 'my-ranking:0.5'"),
        ("drop-mlp@2,by=my-ranking", "expects indices such as 25, found 'by=my-ranking'"),
        ("drop-mlp:2,by=my-ranking,by=cosine", "expected one ranking"),
        ("drop-mlp:2,my-ranking", "consecutive, iterative or by=RANKING after a comma"),
        ("my-mask@2", "expected my-mask:…"),
    ],
)
def test_recipes_with_slips(text: str, said: str) -> None:
    mask("my-mask")(lambda weight: weight)
    ranking("my-ranking")(lambda part: part.before[:, 0])
    with pytest.raises(PrunelensError, match=said):
        parse_recipe(text)


def test_what_a_recipe_needs() -> None:
    mask("by-size")(lambda weight: weight.abs())
    mask("by-inputs")(lambda weight, inputs: weight.abs())
    ranking("my-ranking")(lambda part: part.before[:, 0])
    assert not parse_recipe("by-size:0.5").needs_calibration
    assert parse_recipe("by-inputs:0.5").needs_calibration
    ranked = parse_recipe("drop-mlp:2,by=my-ranking")
    assert ranked.needs_calibration
    assert not ranked.needs_ranking  # of the cosine


# --- what masks are given and give -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_wanda_written_outside_is_wanda_bit_by_bit(family: str, sparsity: str) -> None:
    mask("my-wanda")(lambda weight, inputs: weight.abs().float() * inputs.squares.sqrt().float())
    model = wrap(shared_network(family))
    own, other = (
        apply(parse_recipe(f"{name}:{sparsity}"), model, Calibration(TEXTS)) for name in ("wanda", "my-wanda")
    )
    expected = other.model.network.state_dict()
    for name, weight in own.model.network.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert own.masked.zeros == other.masked.zeros > 0
    assert [note.partition(": ")[2] for note in own.notes] == [note.partition(": ")[2] for note in other.notes]


@pytest.mark.parametrize(("per", "built"), [("matrix", "magnitude"), ("row", None)])
def test_a_threshold_for_a_matrix_or_for_each_row(per: str, built: str | None) -> None:
    mask("by-size", per=per)(lambda weight: weight.abs())
    model = wrap(tiny_network("llama"))
    found = apply(parse_recipe("by-size:0.5"), model).model.network
    for name, weight in found.named_parameters():
        if name.endswith("proj.weight"):
            if built is None:
                assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()
            else:
                magnitudes = dict(model.network.named_parameters())[name].abs()
                threshold = magnitudes.flatten().sort().values[magnitudes.numel() // 2]
                assert torch.equal(weight == 0, magnitudes <= threshold)


def test_the_statistics_are_those_of_the_inputs() -> None:
    """Against the inputs of the first block's projections, seen by hooks and summed in float64."""
    seen: dict[tuple[int, int], list[InputStatistics]] = {}

    @mask("looks")
    def looks(weight: Any, inputs: InputStatistics) -> Any:
        seen.setdefault(tuple(weight.shape), []).append(inputs)
        return weight.abs()

    network = tiny_network("llama")
    layer, sums = network.model.layers[0], {}

    def add(module: Any, args: Any) -> None:
        values = args[0].flatten(0, -2).double()
        total, count = sums.get(module, (0.0, 0))
        sums[module] = (total + values.square().sum(0), count + len(values))

    for module in (layer.self_attn.q_proj, layer.mlp.down_proj):
        module.register_forward_pre_hook(add)
    with torch.no_grad():
        for text in TEXTS:
            network(torch.tensor([text]))
    mask_weights(shared_copy_of(wrap(tiny_network("llama"))), "looks", Pattern(0.5), TEXTS)
    for module in (layer.self_attn.q_proj, layer.mlp.down_proj):
        found = seen[tuple(module.weight.shape)][0]
        total, count = sums[module]
        assert found.num_tokens == count == sum(map(len, TEXTS))
        assert found.squares.dtype == torch.float64
        assert torch.allclose(found.squares, total, rtol=1e-5)


def test_a_function_that_works_in_place_changes_nothing_of_ours() -> None:
    @mask("in-place")
    def in_place(weight: Any, inputs: Any) -> Any:
        inputs.squares.zero_()
        return weight.abs_().mul_(0).add_(1)

    network = tiny_network("llama")
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    found = apply(parse_recipe("in-place:0.5+wanda:0.5"), wrap(network), Calibration(TEXTS))
    assert all(torch.equal(before[name], weight) for name, weight in network.state_dict().items())
    for name, weight in found.model.network.named_parameters():
        if name.endswith("proj.weight"):
            kept = weight != 0
            assert torch.equal(weight[kept], before[name][kept])


# --- what rankings are given and give ----------------------------------------------------------------------


def my_cosine(part: PartStates) -> Any:
    before, after = part.before.double(), part.after.double()
    lengths = before.norm(dim=1) * after.norm(dim=1)
    return (before * after).sum(dim=1) / lengths.clamp(min=1e-300)


@pytest.mark.parametrize("batch_tokens", [1, 12, 1000])
def test_a_cosine_written_outside_equals_the_oracle(family: str, batch_tokens: int) -> None:
    ranking("my-cosine")(my_cosine)
    model = tiny_model(family, torch.float64)
    found = rank_redundancy(model, TEXTS, batch_tokens, by="my-cosine")
    assert found.num_tokens == sum(map(len, TEXTS))
    for kind, scores in oracle.redundancy(model.network, TEXTS).items():
        for layer_idx, score in enumerate(scores):
            assert found.scores[kind, layer_idx] == pytest.approx(score, rel=1e-9), (kind, layer_idx)


@pytest.mark.parametrize(
    "drop", ["drop-attention:2", "drop-sublayers:3", "drop-block:2", "drop-block:2,consecutive", "drop-mlp:2,iterative"]
)
def test_it_chooses_the_same_parts(drop: str) -> None:
    ranking("my-cosine")(my_cosine)
    model = tiny_model()
    own, other = (apply(parse_recipe(text), model, Calibration(TEXTS)).drop for text in (drop, f"{drop},by=my-cosine"))
    assert own == other != Drop()


@pytest.mark.parametrize("recipe", ["drop-attention:1", "drop-block:1", "drop-block:2,consecutive"])
def test_the_highest_scores_go_first(recipe: str) -> None:
    ranking("deepest")(lambda part: torch.full((len(part.before),), float(part.layer_idx)))
    ranking("first")(lambda part: torch.full((len(part.before),), -float(part.layer_idx)))
    model, count = tiny_model(), int(recipe.partition(":")[2].partition(",")[0])
    kind = recipe.partition(":")[0].removeprefix("drop-")
    for by, layers in (("deepest", range(4 - count, 4)), ("first", range(count))):
        found = apply(parse_recipe(f"{recipe},by={by}"), model, Calibration(TEXTS)).drop
        assert found == Drop(**{kind: frozenset(layers)})


def test_each_part_is_seen_once_for_each_token_and_the_texts_are_read_once() -> None:
    seen: dict[tuple[str, int], int] = {}

    @ranking("counts")
    def counts(part: PartStates) -> Any:
        assert part.before.shape == part.after.shape == (len(part.before), 32)
        assert part.before.dtype == part.after.dtype == torch.float32
        seen[part.kind, part.layer_idx] = seen.get((part.kind, part.layer_idx), 0) + len(part.before)
        return part.before[:, 0]

    model, calibration = tiny_model(dtype=torch.bfloat16), Calibration(TEXTS)
    for recipe in ("drop-mlp:1,by=counts", "drop-attention:2,by=counts+drop-block:1,by=counts"):
        apply(parse_recipe(recipe), model, calibration)
    assert seen == {(kind, layer): 17 for kind in ("attention", "mlp", "block") for layer in range(4)}


def test_scores_of_other_texts_or_models_are_not_taken_over() -> None:
    @ranking("sums")
    def sums(part: PartStates) -> Any:
        return part.after.square().sum(1)

    calibration = Calibration(TEXTS)
    apply(parse_recipe("drop-mlp:1,by=sums"), tiny_model(), calibration)
    first = dict(calibration.rankings.known["sums"].scores)
    apply(parse_recipe("drop-mlp:1,by=sums"), tiny_model(seed=3), calibration)
    assert calibration.rankings.known["sums"].scores != first


# --- what goes wrong inside --------------------------------------------------------------------------------


WRONG = {
    "def mine(weight):\n    return 3": "a tensor of scores, found 3",
    "def mine(weight):\n    return None": "a tensor of scores, found null",
    "def mine(weight):\n    return weight.numpy()": "a tensor of scores, found a value of type ndarray",
    "def mine(weight):\n    return weight[0]": r"the shape of the matrix, \(32, 32\), found \(32,\)",
    "def mine(weight):\n    return weight > 0": "floating-point scores, found bool",
    "def mine(weight):\n    return weight.int()": "floating-point scores, found int32",
    "def mine(weight):\n    return weight / 0": "finite scores, found NaN or infinity among them",
    "def mine(weight):\n    return weight.masked_fill(weight > 0, float('inf'))": "finite scores",
}


@pytest.mark.parametrize("body", WRONG)
def test_wrong_scores_of_a_mask(body: str, tmp_path: Path) -> None:
    path = write(tmp_path / "my.py", f"\n@prunelens.mask('mine')\n{body}\n")
    load_plugin(path)
    with pytest.raises(PrunelensError, match=rf"^expected the mask mine in {path}, line 4 to return .*{WRONG[body]}"):
        apply(parse_recipe("mine:0.5"), tiny_model())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1.0", "a tensor of scores, found 1.0"),
        ("return part.before", r"the shape of the tokens, \(\d+,\), found \(\d+, 32\)"),
        ("return part.before[:, 0] * float('nan')", "finite scores"),
        ("return part.before[:, 0].long()", "floating-point scores, found int64"),
    ],
)
def test_wrong_scores_of_a_ranking(body: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "my.py", f"@prunelens.ranking('mine')\ndef mine(part):\n    {body}\n")
    load_plugin(path)
    with pytest.raises(PrunelensError, match=rf"^expected the ranking mine in {path}, line 3 to return .*{said}"):
        apply(parse_recipe("drop-mlp:1,by=mine"), tiny_model(), Calibration(TEXTS))


@pytest.mark.parametrize(
    ("body", "line", "said"),
    [
        ("    return weight.nothing", 6, "AttributeError: 'Tensor' object has no attribute 'nothing'"),
        (
            "    return helper(weight)\ndef helper(weight):\n    return weight @ torch.ones(3)",
            8,
            "RuntimeError: ",
        ),
        ("    raise SystemExit(0)", 6, "SystemExit: 0"),
        ("    raise ValueError", 6, "ValueError: no reason given"),
        ("    raise ValueError('a' * 9999)", 6, "ValueError: aaa"),
        ("    return {}['a\\x1b[31m\\nb']", 6, "KeyError: "),
        ("    raise prunelens.PrunelensError('mine')", 6, "mine"),
    ],
)
def test_an_exception_names_the_last_line_of_the_file(body: str, line: int, said: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "my.py", f"\n@prunelens.mask('mine')\ndef mine(weight):\n{body}\n".replace("\n\n", "\n\n", 1)
    )
    load_plugin(path)
    with pytest.raises(PrunelensError) as caught:
        apply(parse_recipe("mine:0.5"), tiny_model())
    text = str(caught.value)
    assert text.startswith(f"the mask mine failed in {path}, line {line}: {said}")
    assert len(text) < 500
    assert text.isprintable()


def test_a_wrapped_function_is_looked_through(tmp_path: Path) -> None:
    text = "@prunelens.mask('mine')\n@torch.no_grad()\ndef mine(weight):\n    return weight.nothing\n"
    path = write(tmp_path / "my.py", text)
    load_plugin(path)
    assert methods.method_named("mask", "mine").source.file == str(path)
    with pytest.raises(PrunelensError, match=rf"the mask mine failed in {path}, line 6: AttributeError"):
        apply(parse_recipe("mine:0.5"), tiny_model())


def test_memory_that_is_full_is_no_fault_of_the_function() -> None:
    @mask("greedy")
    def greedy(weight: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        apply(parse_recipe("greedy:0.5"), tiny_model())


def test_ctrl_c_stops_as_ever() -> None:
    @ranking("slow")
    def slow(part: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(parse_recipe("drop-mlp:1,by=slow"), tiny_model(), Calibration(TEXTS))


# --- files --------------------------------------------------------------------------------------------------


def test_files_that_are_no_plugin(tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("import prunelens", encoding="utf-8")
    (tmp_path / "folder.py").mkdir()
    for name, said in (
        ("none.py", "expected a file of methods at .*none.py: No such file"),
        ("my.txt", r"whose name ends in \.py, found '.*my.txt'"),
        ("folder.py", "found a directory"),
        ("a\0b.py", "NUL character"),
        ("", "an empty name"),
    ):
        with pytest.raises(PrunelensError, match=said):
            load_plugin(tmp_path / name if name and "\0" not in name else name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def (", r"my.py, line 3: SyntaxError: invalid syntax"),
        ("  x = 1", r"my.py, line 3: IndentationError: unexpected indent"),
        ("import no_such_module", r"my.py, line 3: ModuleNotFoundError: No module named 'no_such_module'"),
        ("\n\n1 / 0", r"my.py, line 5: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", r"my.py, line 3: SystemExit: 3"),
        ("@prunelens.mask('wanda')\ndef mine(weight):\n    return weight", r"my.py, line 3: the name wanda is taken"),
        ("@prunelens.mask('Mine')\ndef mine(weight):\n    return weight", r"my.py, line 3: expected a name of 2 to 40"),
        ("x = 1", r"my.py registers no method; put @prunelens.mask\(\"name\"\)"),
        ("\0", "my.py: (SyntaxError|ValueError): source code string cannot contain null bytes"),
    ],
)
def test_files_that_do_not_load(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "my.py", text)
    before = methods.snapshot()
    with pytest.raises(PrunelensError, match=said):
        load_plugin(path)
    assert methods.snapshot() == before


def test_what_a_failed_file_has_registered_is_gone(tmp_path: Path) -> None:
    good = "@prunelens.mask('mine')\ndef mine(weight):\n    return weight.abs()\n"
    path = write(tmp_path / "my.py", good)
    load_plugin(path)
    first = methods.method_named("mask", "mine")
    write(path, f"{good}\n@prunelens.mask('other')\ndef other(weight):\n    return weight\n1 / 0\n")
    with pytest.raises(PrunelensError, match="line 10: ZeroDivisionError"):
        load_plugin(path)
    assert methods.method_named("mask", "mine") is first
    assert methods.method_named("mask", "other") is None


def test_a_file_may_be_loaded_again_and_edited(tmp_path: Path) -> None:
    text = "@prunelens.mask('mine')\ndef mine(weight):\n    return weight.abs(){}\n"
    path = write(tmp_path / "my.py", text.format(""))
    load_plugins([path, path])
    first = methods.method_named("mask", "mine").source
    write(path, text.format(" + 1"))
    load_plugin(path)
    second = methods.method_named("mask", "mine").source
    assert len(registered("mask")) == 3
    assert (first.file, first.line) == (second.file, second.line)
    assert first.sha256 != second.sha256


def test_two_files_cannot_share_a_name(tmp_path: Path) -> None:
    text = "@prunelens.ranking('mine')\ndef mine(part):\n    return part.before[:, 0]\n"
    load_plugin(write(tmp_path / "one.py", text))
    with pytest.raises(PrunelensError, match=r"two.py, line 3: the name mine is taken by .*one.py, line 3"):
        load_plugin(write(tmp_path / "two.py", text))


def test_a_mask_and_a_ranking_may_share_a_name(tmp_path: Path) -> None:
    text = (
        "@prunelens.ranking('mine')\ndef rank(part):\n    return part.before[:, 0]\n"
        "@prunelens.mask('mine')\ndef mine(weight):\n    return weight\n"
    )
    load_plugin(write(tmp_path / "one.py", text))
    assert str(parse_recipe("drop-mlp:1,by=mine+mine:0.5")) == "drop-mlp:1,by=mine+mine:0.5"
    records = parse_recipe("drop-mlp:1,by=mine+mine:0.5").made_with["methods"]
    assert [record["kind"] for record in records] == ["ranking", "mask"]
    assert {record["file"] for record in records} == {"one.py"}


def test_built_in_methods_leave_no_record() -> None:
    assert parse_recipe("drop-mlp:1+wanda:0.5+quantize:int8").made_with == {}


def test_scores_stay_finite_numbers() -> None:
    """The mean over tokens is one over all batches, not a mean of means."""
    ranking("first-column")(lambda part: part.after[:, 0].double())
    model = tiny_model(dtype=torch.float64)
    found = rank_redundancy(model, TEXTS, 6, by="first-column").scores
    again = rank_redundancy(model, TEXTS, 1000, by="first-column").scores
    for key, value in found.items():
        assert math.isfinite(value)
        assert value == pytest.approx(again[key], rel=1e-9)
