"""What the project promises of itself: one direction of imports, a map of every file, light imports."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "prunelens"
RANK = {
    "errors": 0,
    "reading": 0,
    "memory": 0,
    "stopping": 0,
    "models": 1,
    "pruning": 2,
    "spaces": 2,
    "tasks": 3,
    "tracing": 4,
    "study": 5,
    "report": 6,
    "cli_options": 7,
    "cli_studies": 8,
    "cli": 9,
    "__main__": 10,
}


def imported(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.startswith("prunelens.")]


def test_imports_go_one_way() -> None:
    """Results reach up to the page only when asked to draw it."""
    drawn = {"result.py", "evaluation.py", "sweep.py", "advice.py", "advise.py"}
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            other = name.split(".")[1]
            allowed = (room, other) == ("study", "report") and path.name in drawn
            assert RANK[other] <= RANK[room] or allowed, (path, name)


def test_no_two_test_files_share_a_name() -> None:
    """Pytest imports a test file by its bare name, so a second one of that name would not be run."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


def test_readme_lists_every_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = [path for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    files = [path for path in files if path.name != "__init__.py" or path.parent == SOURCE]
    missing = [str(path.relative_to(ROOT)) for path in files if f"`{path.relative_to(ROOT)}`" not in readme]
    assert not missing


@pytest.mark.parametrize("code", ["import prunelens", "import prunelens.cli"])
def test_imports_stay_light(code: str) -> None:
    """No torch, transformers, pyarrow or plotly before a command needs them."""
    check = "import sys; print(sorted({'torch', 'transformers', 'pyarrow', 'plotly', 'numpy'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", f"{code}; {check}"], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    import prunelens

    for name in prunelens.__all__:
        assert getattr(prunelens, name).__doc__
    assert set(dir(prunelens)) == {*prunelens.__all__, "__version__"}
    assert prunelens.__version__ == version("prunelens")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = prunelens.no_such_name


def test_python_m_is_the_command_line() -> None:
    command = [sys.executable, "-m", "prunelens", "--version"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout == f"prunelens {version('prunelens')}\n"
