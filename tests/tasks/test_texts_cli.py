"""Prompts on the command line: what cannot be read is one sentence and exit code 2, and leaves nothing behind."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers import processors

import prunelens.cli.main
from conftest import text_network, text_tokenizer
from prunelens.tasks import rendering

Cli = Callable[..., tuple[int, str]]
PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{% if p.type == 'text' %} {{ p.text }}{% endif %}"
    "{% endfor %}\n\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
LINES = ["What is rain?", "Name a fruit.", "Count to three."]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path.parent / "cache"))
    monkeypatch.setenv("COLUMNS", "400")
    text_network().save_pretrained("m")
    Path("p.txt").write_text("\n".join(LINES))

    def run(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["prunelens", *argv])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            prunelens.cli.main.main()
        printed = capsys.readouterr()
        code = int(stop.value.code or 0)
        return code, printed.err if code else printed.out

    return run


def compare(cli: Cli, template: str | None = None, end: bool = False, more: tuple[str, ...] = ()) -> tuple[int, str]:
    tokenizer = text_tokenizer()
    tokenizer.chat_template = template
    if end:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", 2)]
        )
    tokenizer.save_pretrained("m")
    rest = ("--prompts", "p.txt", "--max-new-tokens", "2", "--lens-steps", "0", "--output", "out", *more)
    return cli("compare", "m", "drop-attention@1", *rest)


def test_the_text_of_every_prompt_reaches_a_template_of_parts(cli: Cli) -> None:
    assert compare(cli, PARTS)[0] == 0
    rows = pq.read_table("out/prompts.parquet").to_pylist()
    assert [row["text"] for row in rows] == LINES
    read = [text_tokenizer().decode(row["token_ids"]) for row in rows]
    assert read == [f"user: {line}\nassistant:" for line in LINES]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out or changes the text of the user message"),
        ("{{ messages[0].content | upper }}", "leaves out or changes the text of the user message"),
        ("{{ raise_exception('only systems') }}", "fails on prompt 'line-1' (only systems)"),
        ("{{ 1 // 0 }}", "fails on prompt 'line-1'"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not end within 0.3 s"),
        ("{{ 'x' * 10 ** 12 }}", "needs more than 1024 MiB"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, template: str, said: str
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    code, told = compare(cli, template)
    assert code == 2
    assert "the chat template of m " in told
    assert said in told
    assert "--no-chat-template" in told
    assert len(told.strip().splitlines()) == 1
    assert sorted(path.name for path in Path().iterdir()) == ["m", "p.txt"]
    assert compare(cli, template, more=("--no-chat-template",))[0] == 0


def test_an_end_that_is_left_off_is_told_on_the_terminal_and_the_page(cli: Cli) -> None:
    code, told = compare(cli, end=True)
    assert code == 0
    assert "appends '<eos>' to every text" in told
    assert "appends &#39;&lt;eos&gt;&#39; to every text" in Path("out/report.html").read_text()
    assert len(json.loads(Path("out/run.json").read_text())["notes"]) == 2  # the other: three prompts are few
    rows = pq.read_table("out/prompts.parquet").to_pylist()
    assert [row["token_ids"] for row in rows] == [text_tokenizer()(line)["input_ids"] for line in LINES]


def test_pruning_on_such_texts_tells_it_too(cli: Cli) -> None:
    compare(cli, end=True)
    code, told = cli("prune", "m", "drop-attention:1", "--calibration", "p.txt", "--output", "small")
    assert code == 0
    assert "appends '<eos>' to every text" in told


def test_a_sweep_tells_what_its_cells_were_told(cli: Cli) -> None:
    compare(cli, end=True)
    study = {"model": "m", "recipes": ["drop-attention@0", "drop-mlp@0"], "compare": {"prompts": "p.txt"}}
    study["compare"] |= {"max_new_tokens": 2, "lens_steps": 0}
    Path("study.yaml").write_text(json.dumps(study))
    code, told = cli("sweep", "study.yaml", "--output", "all")
    assert code == 0
    assert told.count("appends '<eos>' to every text") == 1
    assert Path("all/report.html").read_text().count("appends &#39;&lt;eos&gt;&#39; to every text") == 1
