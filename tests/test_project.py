"""What the project promises of itself: one direction of imports, no circles, short files, light imports."""

import ast
import importlib
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "prunelens"
RANK = {
    **dict.fromkeys(("errors", "reading", "memory", "stopping", "progress", "documents", "files", "locks", "cache"), 0),
    "metrics": 1,
    "models": 1,
    "pruning": 2,
    "tasks": 3,
    "tracing": 3,
    "study": 4,
    "report": 5,
    "results": 6,
    "api": 7,
    "cli": 8,
    "__main__": 9,
    "__init__": 10,
}
SCRIPTS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.py")])
LONGEST = 300
"""Lines of a file."""
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}


def imported(name: str) -> set[str]:
    """The modules of ours that a module imports anywhere in it, at its head or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "prunelens":
            home = node.module.removeprefix("prunelens").removeprefix(".") if node.module else ""
            for alias in node.names:
                whole = f"{home}.{alias.name}".removeprefix(".")
                found.add(whole if whole in MODULES else home or "__init__")
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "prunelens"]
            found |= {each.removeprefix("prunelens").removeprefix(".") or "__init__" for each in names}
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name: str) -> None:
    room = RANK[name.split(".")[0]]
    for other in imported(name):
        assert other in MODULES, other
        lazily_named = name.startswith("cli") and other == "__init__"  # the version
        assert RANK[other.split(".")[0]] <= room or lazily_named, (name, other)


def test_no_circles() -> None:
    """Not between modules; and not between the folders of a room either, so that each can be read by itself."""
    modules = {name: imported(name) for name in MODULES}
    assert_sorted(modules)
    folders: dict[str, set[str]] = {}
    for name, others in modules.items():
        folder = name.rpartition(".")[0]
        if folder:
            apart = {other.rpartition(".")[0] for other in others} - {folder, ""}
            folders.setdefault(folder, set()).update(apart)
    rooms = {"models", "study", "report", "cli", "pruning"}  # what lies in a room beside its folders serves them all
    assert_sorted({one: others - rooms for one, others in folders.items() if one not in rooms})


def assert_sorted(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_no_file_is_long() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_no_two_test_files_share_a_name() -> None:
    """Pytest imports a test file by its bare name, so a second one of that name would not be run."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


@pytest.mark.parametrize("code", ["import prunelens", "import prunelens.cli.main"])
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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_what_there_is(path: Path) -> None:
    """Nothing runs them here, so a moved name would not be seen."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prunelens"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), (path.name, node.module, alias.name)
