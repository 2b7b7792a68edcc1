"""Helps fit 80 columns and are grouped; a wrong option names the help of its own command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_cli import Cli, cli, template, work  # noqa: F401

COMMANDS = ("compare", "demo", "prune", "benchmark", "evaluate", "sweep", "advise", "report", "inspect")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_a_help_fits_its_lines(cli: Cli, monkeypatch: pytest.MonkeyPatch, command: str) -> None:  # noqa: F811
    monkeypatch.setenv("COLUMNS", "80")
    code, stdout, stderr = cli(*([command] if command else []), "--help")
    assert (code, stderr) == (0, "")
    assert all(len(line) <= 80 for line in stdout.splitlines())
    for line in stdout.splitlines():
        if re.match(r"  -", line):  # an option and the beginning of its help stand on one line
            assert re.match(r"  -\S.*?\S {2,}\S", line), line
    if not command:
        assert all(re.search(rf"^  {name} +[A-Z].*[^.]\.$", stdout, re.MULTILINE) for name in COMMANDS), stdout


def test_options_of_compare_stand_in_groups(cli: Cli) -> None:  # noqa: F811
    _, stdout, _ = cli("compare", "--help")
    places = [
        stdout.index(f"\n{title}:\n") for title in ("Arguments", "Texts", "Inside the model", "Hardware", "Output")
    ]
    assert places == sorted(places)
    inside = stdout[places[2] : places[3]]
    assert all(option in inside for option in ("--lens", "--lens-steps", "--attribute", "--noise-dtype", "--draft"))
    assert "--no-chat-template" in stdout[places[1] : places[2]]


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_wrong_option_names_its_own_help(cli: Cli, command: str) -> None:  # noqa: F811
    code, stdout, stderr = cli(command, "--bad")
    assert (code, stdout) == (2, "")
    assert f"prunelens {command} --help`" in stderr


def test_completion_and_help_load_no_library() -> None:
    program = (
        "import sys; sys.argv = ['prunelens', *sys.argv[1:]]\n"
        "from prunelens.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    print('heavy:', *sorted({'torch', 'numpy', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    asked = {"_PRUNELENS_COMPLETE": "complete_bash", "COMP_WORDS": "prunelens comp", "COMP_CWORD": "1"}
    for more, arguments, said in (
        (asked, [], "compare"),
        ({}, ["--help"], "compare"),
        ({}, ["compare", "--help"], "DENSE"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=os.environ | more,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert said in done.stdout, done.stderr
        assert re.search(r"^heavy:\s*$", done.stdout, re.MULTILINE), done.stdout


def test_code_is_refused_before_anything_heavy(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("prunelens.study.evaluate.evaluate.check_evaluation", lambda *given: pytest.fail("went on"))
    code, stdout, stderr = cli("evaluate", "model", "drop-attention:1", "--tasks", "humaneval")
    assert (code, stdout) == (2, "")
    assert "humaneval runs code that the model writes" in stderr
    assert "--allow-code" in stderr
