"""What the documents say can be run, is what was printed, and leads somewhere."""

import ast
import importlib.util
import inspect
import re
import shlex
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import typer

import prunelens
from prunelens.cli.main import app
from prunelens.errors import PrunelensError
from prunelens.pruning.recipe import is_recipe, parse_recipe
from prunelens.study.sweep.study_file import read_study

ROOT = Path(__file__).parents[1]
LANGUAGES = {"sh", "bash", "python", "yaml", "json", "toml", "mermaid", "bibtex"}
"""Of blocks that people write; what a program printed has a marker instead."""
NUMBER = re.compile(r"[+−-]?\d[\d.,]*")
MEASURED = re.compile(r"^<!-- measured: (.+?)(?:; printed: ([\w-]+))? -->$")


def loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs = loaded("scripts/docs.py")
CHECKED = [*docs.DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@cache
def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def command_faults(line: str) -> list[str]:
    """What is wrong with a command; options and recipes are parsed, nothing is run."""
    words = shlex.split(line, comments=True)
    if words[:1] == ["make"]:
        return [f"{line}: no such target" for word in words[1:] if word not in targets()]
    if words[:1] != ["prunelens"]:
        return []
    if words[1:] == ["--help"]:
        return []
    outside = "--plugin" in words  # its methods are those of a file that is not here
    if outside:
        at = words.index("--plugin")
        words = words[:at] + words[at + 2 :]
    group = typer.main.get_command(app)
    try:
        context = group.make_context("prunelens", words[1:], help_option_names=[])
        rest = [*context._protected_args, *context.args]
        if rest:
            name, command, rest = group.resolve_command(context, rest)
            if rest != ["--help"]:
                command.make_context(name, rest, parent=context)
        for word in words:
            if not outside and is_recipe(word) and not word.endswith((".yaml", ".yml")):
                parse_recipe(word)
    except (PrunelensError, Exception) as error:  # click's own exceptions have no public base in typer
        return [f"{line}: {getattr(error, 'message', error)}"]
    return []


def python_faults(code: str) -> list[str]:
    """Names and keywords that a block takes from prunelens and that are not there."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        return [f"{error}: {code}"]
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "prunelens"
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "prunelens":
            found += [alias.name for alias in node.names if not hasattr(prunelens, alias.name)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            found += [node.attr] if not hasattr(prunelens, node.attr) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found += unknown_keywords(node, aliases)
    return [f"prunelens has no {name}" for name in found]


def unknown_keywords(node: ast.Call, aliases: set[str]) -> list[str]:
    assert isinstance(node.func, ast.Attribute)
    owner, name = node.func.value, node.func.attr
    if not (isinstance(owner, ast.Name) and owner.id in aliases and hasattr(prunelens, name)):
        return []
    known = inspect.signature(getattr(prunelens, name)).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values()):
        return []
    return [f"{name}({word.arg}=…)" for word in node.keywords if word.arg and word.arg not in known]


def yaml_faults(text: str) -> list[str]:
    """What is wrong with a recipe or a study."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            read_study(path) if text.startswith("model:") else parse_recipe(str(path))
        except PrunelensError as error:
            return [str(error)]
    return []


def block_faults(text: str) -> list[str]:
    """Blocks that are not what was printed, or that look printed and are not marked."""
    found = []
    for fence in docs.fences(text):
        marker = docs.MARKED.match(fence.before)
        if marker and marker[1] not in docs.COMMANDS:
            found.append(f"no command is called {marker[1]}")
        elif marker and fence.lines != docs.expected(marker):
            found.append(f"not what `{docs.COMMANDS[marker[1]]}` printed: run `make docs`\n{fence.text}")
        elif not marker and fence.language not in LANGUAGES:
            found.append(f"a block without language or marker:\n{fence.text}")
    return found


def tables(text: str) -> list[tuple[str, list[list[str]]]]:
    """Each table's rows without its head, with the line before it."""
    found: list[tuple[str, list[list[str]]]] = []
    before, rows = "", []
    for line in [*text.split("\n"), ""]:
        if line.startswith("|"):
            rows.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
        else:
            if rows:
                found.append((before, rows[2:]))
                rows = []
            before = line
    return found


def table_faults(text: str) -> list[str]:
    """Tables of measurements that do not name their command, or hold numbers that it did not print."""
    found = []
    for before, rows in tables(text):
        marker = MEASURED.match(before)
        numeric = sum(sum(NUMBER.match(cell) is not None for cell in row) >= 2 for row in rows)
        if marker is None:
            found += [f"which command measured {rows[0]}?"] if 2 * numeric > len(rows) else []
            continue
        found += command_faults(marker[1])
        if marker[2]:
            known = numbers(docs.stored(marker[2]).read_text(encoding="utf-8"))
            cells = [cell for row in rows for cell in row if not cell.startswith("`")]
            found += [f"{number} was not printed" for cell in cells for number in numbers(cell) if number not in known]
    return found


def numbers(text: str) -> list[str]:
    """All numbers without their signs, thousands apart."""
    return [found.strip("+−-.,") for found in NUMBER.findall(text)]


def slugs(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    bare = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", bare, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def link_faults(text: str, path: Path) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists():
            found.append(f"{target}: no such file")
        elif anchor and anchor not in slugs(file.read_text(encoding="utf-8")):
            found.append(f"{target}: no such heading")
    return found


def path_faults(text: str) -> list[str]:
    """Files named in backticks that are not there."""
    names = re.findall(r"`((?:[\w.-]+/)+[\w.-]*(?:\.\w+|/))`", text)
    ours = [
        name for name in names if name.split("/")[0] in {*OURS, "src", "tests", "docs", "scripts", "benchmarks", "dev"}
    ]
    return [name for name in ours if not any((home / name).exists() for home in (ROOT, ROOT / "src" / "prunelens"))]


OURS = {path.name for home in (ROOT, ROOT / "src" / "prunelens") for path in home.iterdir() if path.is_dir()}


def all_faults(text: str, path: Path) -> list[str]:
    found = [*block_faults(text), *table_faults(text), *link_faults(text, path), *path_faults(text)]
    for fence in docs.fences(text):
        if fence.language in ("sh", "bash"):
            lines = fence.text.replace("\\\n", " ").split("\n")
            found += [fault for line in lines for fault in command_faults(line)]
        elif fence.language == "python":
            found += python_faults(fence.text)
        elif fence.language == "yaml":
            found += yaml_faults(fence.text)
    return found


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: path.name)
def test_documents_are_true(path: Path) -> None:
    assert all_faults(path.read_text(encoding="utf-8"), path) == []


def test_stored_outputs_are_those_of_their_commands() -> None:
    assert {path.stem for path in docs.STORED.iterdir()} == set(docs.COMMANDS)
    shown = "".join(path.read_text(encoding="utf-8") for path in docs.DOCUMENTS)
    for name, command in docs.COMMANDS.items():
        lines = docs.stored(name).read_text(encoding="utf-8").split("\n")
        assert lines[0] == f"$ {command}"
        assert name == "misspelt" or max(map(len, lines[1:])) <= 80, name  # an error is one line, however long
        assert f": {name}" in shown, name
        assert command_faults(command) == [] or name == "misspelt"


def test_readme_is_a_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert max(len(rows) for _, rows in tables(text)) <= 10


def test_readme_measures_what_the_guide_does() -> None:
    """Each row of the README's table of measurements, cell by cell, is in the guide's row of that recipe."""
    guide = {
        row[0]: row for _, rows in tables((ROOT / "docs" / "guide.md").read_text(encoding="utf-8")) for row in rows
    }
    readme = tables((ROOT / "README.md").read_text(encoding="utf-8"))
    short = next(rows for before, rows in readme if MEASURED.match(before))
    assert len(short) == 5
    for recipe, *cells in short:
        assert set(cells) <= set(guide[recipe]), recipe


def test_repair_table_is_that_of_the_stored_cells() -> None:
    made = loaded("benchmarks/repair.py").table(ROOT / "benchmarks" / "repair-smollm2")
    shown = (ROOT / "docs" / "repair.md").read_text(encoding="utf-8")
    assert made in shown
    by_name = {(row[0], row[1]): row for _, rows in tables(made) for row in rows}
    short = next(rows for _, rows in tables(shown) if len(rows[0]) == 8)
    assert len(short) == 20
    for drop, repair, saved, kl, *scores in short:
        full = by_name[drop, repair]
        assert [saved, kl, scores[0]] == [full[2], full[3], full[5]]
        for rounded, exact in zip(scores[1:], (full[7], full[8], full[12]), strict=True):
            pairs = zip(numbers(rounded), numbers(exact), strict=True)
            assert all(abs(float(one) - float(other)) <= 0.51 for one, other in pairs), (drop, repair)


@pytest.mark.parametrize("path", docs.DOCUMENTS, ids=lambda path: path.name)
def test_a_changed_digit_is_found(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for fence in docs.fences(text):
        if docs.MARKED.match(fence.before) and re.search(r"\d", fence.text):
            lines = text.split("\n")
            at = fence.start + 1 + next(index for index, line in enumerate(fence.lines) if re.search(r"\d", line))
            lines[at] = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), lines[at], count=1)
            assert block_faults("\n".join(lines)), fence.text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```\nKL 0.05\n```", "without language or marker"),
        ("<!-- printed: inspect -->\n```\nsmollm2\n```", "not what"),
        ("<!-- printed: nothing -->\n```\nx\n```", "no command"),
        ("```sh\nprunelens compare a b --no-such-option\n```", "no-such-option"),
        ("```sh\nprunelens comparee a b\n```", "comparee"),
        ("```sh\nprunelens compare smollm2 drop-atention:1\n```", "drop-attention"),
        ("```sh\nmake no-such-target\n```", "no such target"),
        ("```python\nimport prunelens as pl\npl.comparee()\n```", "comparee"),
        ("```python\nimport prunelens as pl\npl.prune('a', 'b', 'c', calibrate='d')\n```", "calibrate"),
        ("```python\nfrom prunelens import nothing\n```", "nothing"),
        ("```python\nx = (\n```", "never closed"),
        ("```yaml\nmodel: a\nrecipes: [drop-mlp:1]\nseed: [1]\n```", "seeds"),
        ("```yaml\nsteps: [{method: wanda, sparsety: 0.5}]\n```", "sparsity"),
        ("[x](nowhere.md)", "no such file"),
        ("[x](docs/theory.md#nowhere)", "no such heading"),
        ("`models/nowhere.py`", "nowhere"),
        ("| a | b |\n|---|---|\n| 1.0 | 2 % |", "which command"),
        (
            "<!-- measured: prunelens demo; printed: inspect -->\n| a | b |\n|---|---|\n| 98765 | 1 |",
            "98765 was not printed",
        ),
    ],
)
def test_checks_can_fail(text: str, fault: str) -> None:
    assert any(fault in found for found in all_faults(text, ROOT / "README.md"))
