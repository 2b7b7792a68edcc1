"""The example of docs/methods.md, exactly as it stands there: from a file, and from an installed package."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import mask_oracle
import oracle
from conftest import text_network, text_tokenizer, tiny_model, without_progress
from prunelens import InputStatistics
from prunelens.models.opening.loading import load
from prunelens.pruning import methods
from prunelens.pruning.apply import apply
from prunelens.pruning.plugins import load_plugin
from prunelens.pruning.pruned import Calibration
from prunelens.pruning.recipe import parse_recipe
from prunelens.pruning.redundancy import rank_redundancy
from prunelens.study.sweep.study_file import parse_study

PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
TEXTS = [[5, 9, 33, 71, 8], [4, 90], [17, 3, 3, 60, 61, 62, 88, 12], [20, 44]]
BOTH = "drop-mlp:2,by=my-cosine+my-wanda:0.5"
BUILT_IN = "drop-mlp:2+wanda:0.5"


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = methods.snapshot()
    yield
    methods.restore(before)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    path = tmp_path / "my.py"
    path.write_text(blocks("python")[0], encoding="utf-8")
    (tmp_path / "texts.txt").write_text("Some text that calibrates.\n", encoding="utf-8")
    text_network().save_pretrained(tmp_path / "tiny")
    text_tokenizer().save_pretrained(tmp_path / "tiny")
    return path


def run(place: Path, *command: str, code: int = 0, **environment: str) -> str:
    """What a command of its own process prints, in `place`."""
    found = subprocess.run(
        [sys.executable, *command],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ, PRUNELENS_CACHE=str(place / "cache"), **environment),
    )
    assert found.returncode == code, found.stderr
    return found.stdout if code == 0 else found.stderr


def same_weights(left: Path, right: Path) -> bool:
    own, other = (load(folder).network.state_dict() for folder in (left, right))
    return own.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in own.items())


def test_the_example_is_short() -> None:
    assert len(blocks("python")[0].splitlines()) <= 30


def test_its_mask_is_wanda_bit_by_bit(example: Path) -> None:
    load_plugin(example)
    model = tiny_model()
    own, other = (
        apply(parse_recipe(f"{name}:0.5"), model, Calibration(TEXTS)).model.network for name in ("wanda", "my-wanda")
    )
    assert all(torch.equal(weight, dict(other.named_parameters())[name]) for name, weight in own.named_parameters())
    inputs = torch.randn(40, 24)
    weight, read = torch.randn(9, 24), InputStatistics(inputs.double().square().sum(0), 40)
    scores = methods.method_named("mask", "my-wanda").function(weight, read)
    expected = torch.from_numpy(mask_oracle.wanda_metric(weight.numpy(), inputs.numpy()))
    assert torch.allclose(scores.double(), expected.double(), rtol=1e-6)


def test_its_ranking_is_the_cosine(example: Path) -> None:
    load_plugin(example)
    model = tiny_model(dtype=torch.float64)
    found = rank_redundancy(model, TEXTS, by="my-cosine")
    for kind, scores in oracle.redundancy(model.network, TEXTS).items():
        for layer_idx, score in enumerate(scores):
            assert found.scores[kind, layer_idx] == pytest.approx(score, rel=1e-9)
    for drop in ("drop-sublayers:3", "drop-block:2,consecutive", "drop-attention:2,iterative"):
        own, other = (
            apply(parse_recipe(text), model, Calibration(TEXTS)).drop for text in (drop, f"{drop},by=my-cosine")
        )
        assert own == other


def test_from_a_file(example: Path, tmp_path: Path) -> None:
    prune = ("-m", "prunelens", "prune", "tiny", "--calibration", "texts.txt")
    run(tmp_path, *prune, BOTH, "-o", "mine", "--plugin", "my.py")
    run(tmp_path, *prune, BUILT_IN, "-o", "theirs")
    assert same_weights(tmp_path / "mine", tmp_path / "theirs")


def test_from_python(example: Path, tmp_path: Path) -> None:
    """Importing the module is enough, and its names stand in recipes from then on."""
    code = "import prunelens, my; print(prunelens.parse_recipe({!r}))"
    assert run(tmp_path, "-c", code.format(BOTH)) == f"{BOTH}\n"


def test_an_error_inside_it_names_the_file_and_the_line(example: Path, tmp_path: Path) -> None:
    """The sentence that the page shows is the one that is printed."""
    example.write_text(example.read_text().replace("inputs.squares.sqrt()", "inputs.norms"), encoding="utf-8")
    prune = ("-m", "prunelens", "prune", "tiny", "--calibration", "texts.txt", "my-wanda:0.5", "-o", "out")
    said = run(tmp_path, *prune, "--plugin", "my.py", code=2)
    shown = without_progress(said).replace(str(tmp_path), "/home/me").removeprefix("prunelens: ").strip()
    assert f"`{shown}`" in " ".join(PAGE.split())
    assert not (tmp_path / "out").exists()


def test_from_a_package(example: Path, tmp_path: Path) -> None:
    """As `pip install` leaves it; nothing of it is imported before a recipe names it."""
    target = install(example, tmp_path)
    paths = os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])
    prune = ("-m", "prunelens", "prune", "tiny", "--calibration", "texts.txt")
    run(tmp_path, *prune, BOTH, "-o", "mine", PYTHONPATH=paths)
    run(tmp_path, *prune, BUILT_IN, "-o", "theirs")
    assert same_weights(tmp_path / "mine", tmp_path / "theirs")
    record = load(tmp_path / "mine").network.config.prunelens["methods"][0]
    assert (record["distribution"], record["version"], record["file"]) == ("my-methods", "1.2", "my.py")

    unasked = (
        "from prunelens.pruning.recipe import parse_recipe; import sys; parse_recipe({!r}); print('my' in sys.modules)"
    )
    assert run(tmp_path, "-P", "-c", unasked.format("wanda:0.5+quantize:int8"), PYTHONPATH=paths) == "False\n"
    assert run(tmp_path, "-P", "-c", unasked.format("my-wanda:0.5"), PYTHONPATH=paths) == "True\n"
    said = run(tmp_path, *prune, "my-wandas:0.5", "-o", "out", code=2, PYTHONPATH=paths)
    assert "there is no method 'my-wandas' (did you mean my-wanda?)" in said
    (target / "my.py").write_text("1 / 0\n", encoding="utf-8")
    said = run(tmp_path, *prune, "my-wanda:0.5", "-o", "out", code=2, PYTHONPATH=paths)
    assert said == (
        "prunelens: the package my-methods offers the method 'my-wanda' and cannot be imported: "
        f"{target}/my.py, line 1: ZeroDivisionError: division by zero\n"
    )


def install(example: Path, folder: Path) -> Path:
    """The example in a package with the entry points of the page, installed into a folder by pip; nothing is loaded."""
    package, target = folder / "package", folder / "installed"
    package.mkdir()
    example.rename(package / "my.py")
    points = blocks("toml")[0]
    assert tomllib.loads(points)["project"]["entry-points"]["prunelens.methods"].keys() == {"my-wanda", "my-cosine"}
    (package / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "my-methods"\nversion = "1.2"\n{points}[tool.setuptools]\npy-modules = ["my"]\n',
        encoding="utf-8",
    )
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    run(folder, *pip, "--no-build-isolation", "--target", str(target), str(package))
    return target


def test_commands_of_the_page_are_ones_that_there_are() -> None:
    """Every line parses: the commands know the options, the recipes know the names."""
    namespace: dict[str, object] = {}
    exec(compile(blocks("python")[0], "/page/my.py", "exec"), namespace)
    lines = [line.split() for block in blocks("bash") for line in block.splitlines()]
    assert {line[1] for line in lines} == {"compare", "evaluate", "prune", "benchmark", "sweep", "advise"}
    for line in lines:
        assert line[-2:] == ["--plugin", "my.py"]
        for word in line:
            if ":" in word:
                assert str(parse_recipe(word)) == word
    study = yaml.safe_load(re.findall(r"`(recipes: \[.*\])`", PAGE)[0])
    assert parse_study({"model": "smollm2"} | study).recipes == (
        "my-wanda:0.3",
        "my-wanda:0.5",
        "drop-mlp:4,by=my-cosine",
    )
    for recipe in re.findall(r'"(my-wanda[^"]*|drop[^"]*)"', blocks("python")[1]):
        assert str(parse_recipe(recipe)) == recipe
