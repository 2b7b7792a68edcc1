"""What `compare` shows: one screen with the answer, the first texts that diverge, the page, and what to run next."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.table import Table
from rich.text import Text

from prunelens.errors import printable
from prunelens.report.terminal.compare_full import print_full
from prunelens.report.terminal.screen import closing, console, lean_table
from prunelens.report.wording import expectation, percent
from prunelens.study.compare.summary import by_damage_per_byte, free_agreement, texts_of

MOST_WITH_INTERVALS = 8
"""Compressed models; beyond that the table is one line a model."""
MOST_TEXTS = 3
"""Compressed models whose text is shown below the dense one's."""
BEFORE = 60
"""Characters shown of what both texts share before they diverge."""
MOST_CHARACTERS = 150
"""Characters of a text, and of a prompt."""


def print_result(
    tables: dict[str, pa.Table],
    info: dict[str, Any],
    page: Path | None = None,
    seconds: float | None = None,
    following: str = "",
    full: bool = False,
) -> None:
    """Print the screen: the answer first.

    Args:
        tables: of the run.
        info: the content of its run.json.
        page: where the page lies.
        seconds: that the command took.
        following: the next command worth running.
        full: every number of the run too.
    """
    screen = console()
    screen.print(_title(info), answer_table(info), Text(_explained(info), style="dim"), sep="\n")
    for line in _expected(info):
        screen.print(Text(line))
    screen.print(_diverging(tables, info))
    if full:
        print_full(info)
    closing(screen, page, remarks(info), seconds, following)


def _explained(info: dict[str, Any]) -> str:
    """What the columns mean, and the rows of anchors where there are any."""
    kinds = [found["anchor"] for found in info.get("anchors", []) if "reason" not in found]
    return EXPLAINED + (SCALE.format(", ".join(kinds)) if kinds else "")


def _expected(info: dict[str, Any]) -> list[str]:
    """What the forecast says, class by class, under the name of each model."""
    lines: list[str] = []
    for record in by_damage_per_byte(info["summary"]):
        found = record.get("expected") or []
        lines += [printable(record["compressed"]), *(f"  {expectation(one)}" for one in found)] if found else []
    return [*lines, ""] if lines else []


@dataclass(frozen=True)
class _Cell:
    main: str
    below: str = ""


Show = Callable[[dict[str, Any]], _Cell]


def answer_table(info: dict[str, Any]) -> Table:
    """One row per compressed model, least damage per byte saved first."""
    summary = by_damage_per_byte(info["summary"])
    columns = [(name, show) for name, show in COLUMNS if any(show(record).main for record in summary)]
    table = lean_table()
    table.add_column("", overflow="fold", min_width=16)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    several = len(summary) <= MOST_WITH_INTERVALS
    for record in summary:
        cells = [show(record) for _, show in columns]
        shown = [Text(f"{cell.main}\n{cell.below}".rstrip("\n") if several else cell.main) for cell in cells]
        table.add_row(Text(printable(record["compressed"])), *shown)
    for anchor in info.get("anchors", []):
        if "reason" not in anchor:
            given = [show(anchor) if name in ANCHORED else _Cell("") for name, show in columns]
            shown = [Text(f"{cell.main}\n{cell.below}".rstrip("\n") if several else cell.main) for cell in given]
            table.add_row(Text(f"dense in {anchor['anchor']}"), *shown, style="dim")
    return table


def _title(info: dict[str, Any]) -> Text:
    summary = info["summary"]
    models = _count(len(summary), "compressed model")
    prompts = _count(summary[0]["greedy_check"]["prompts"], "prompt")
    return Text(f"{printable(info['dense']['name'])} against {models}, {prompts}\n", style="bold")


EXPLAINED = """\
KL: nats per token. S(8): both models sample the same 8 tokens. Faithful: tokens
until half of the sampled texts have diverged. [95 % intervals over prompts]
"""
SCALE = "Dense in {}: its own weights rounded, for scale.\n"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _saved(record: dict[str, Any]) -> _Cell:
    size = record["size"]
    zeros = f"{100 * size['zeros']:.0f} % zero" if size["zeros"] > 0.01 else ""
    return _Cell("0 %" if size["kl_per_percent"] is None else percent(size["saved"]), zeros)


def _kl(record: dict[str, Any]) -> _Cell:
    found = record["kl"]
    return _Cell(f"{found['mean']:.2g}", f"[{found['low']:.2g}, {found['high']:.2g}]")


def _survival(record: dict[str, Any]) -> _Cell:
    found = record["survival"].get("8")
    if found is None:
        return _Cell("too short")
    low, high = 100 * found["low"], 100 * found["high"]
    return _Cell(f"{100 * found['value']:.0f} %", f"[{low:.0f}, {high:.0f}]")


def _faithful(record: dict[str, Any]) -> _Cell:
    found = record["faithful_length"]
    return _Cell(f"{'≥ ' if found['beyond_horizon'] else ''}{found['median']}")


def _choice(record: dict[str, Any]) -> _Cell:
    found = record["options"]
    return _Cell(f"{found['same_choice']} of {found['prompts']}" if found else "")


COLUMNS: list[tuple[str, Show]] = [
    ("bytes\nsaved", _saved),
    ("same\nchoice", _choice),
    ("same\ntop-1", lambda record: _Cell(percent(record["same_top1"]["mean"]))),
    ("\nKL", _kl),
    ("\nS(8)", _survival),
    ("faith-\nful", _faithful),
]

ANCHORED = ("same\ntop-1", "\nKL", "\nS(8)", "faith-\nful")
"""Columns that anchors have a number for."""


def _diverging(tables: dict[str, pa.Table], info: dict[str, Any]) -> Text | Table:
    """The first prompt on which greedy texts diverge, the dense text above the others."""
    labels = [record["compressed"] for record in by_damage_per_byte(info["summary"])]
    agreed = {label: free_agreement(tables, label) for label in labels}
    own = {label: texts_of(tables, label) for label in labels}
    dense = texts_of(tables, "dense")
    for prompt in tables["prompts"].to_pylist():
        key = prompt["prompt_id"]
        if any(own[label][key]["token_ids"] != dense[key]["token_ids"] for label in labels):
            break
    else:
        return Text("Greedy texts: the same on every prompt.")
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(overflow="fold", max_width=24)
    grid.add_column(overflow="fold")
    shared = min(len("".join(dense[key]["tokens"][: agreed[label][key]])) for label in labels)
    start = max(0, shared - BEFORE)
    grid.add_row("greedy", Text(_cut(_flat(prompt["text"]), MOST_CHARACTERS), style="bold"))
    grid.add_row("dense", _excerpt(dense[key], len(dense[key]["tokens"]), start))
    for label in labels[-MOST_TEXTS:]:
        same = own[label][key]["token_ids"] == dense[key]["token_ids"]
        text = Text("the same text", "dim") if same else _excerpt(own[label][key], agreed[label][key], start)
        grid.add_row(Text(printable(label)), text)
    return grid


def _excerpt(found: dict[str, Any], agreed: int, start: int) -> Text:
    """A text from a character on, with a mark where it leaves the dense one."""
    tokens = found["tokens"][:-1] if found["ended"] else found["tokens"]
    head, tail = "".join(tokens[:agreed]), "".join(tokens[agreed:])
    end = " ⏹" if found["ended"] else " …"
    text = Text(("…" if start else "") + _flat(head[start:][:MOST_CHARACTERS]))
    room = MOST_CHARACTERS - len(text)
    if agreed < len(found["tokens"]):
        text.append("⟂", style="bold red")
        text.append(_flat(tail[: max(room, 0)]), style="red")
    return text.append(end if len(head[start:]) + len(tail) <= MOST_CHARACTERS else " …")


def _flat(text: str) -> str:
    return " ".join(printable(text).replace("\n", " ↵ ").split(" "))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def remarks(info: dict[str, Any]) -> list[str]:
    """What a reader should be warned of."""
    found = [printable(note) for note in info["notes"]]
    reasons = [one for one in info.get("anchors", []) if "reason" in one]
    found += [f"no anchor {one['anchor']}: {printable(one['reason'])}" for one in reasons]
    for record in info["summary"]:
        check, name = record["greedy_check"], printable(record["compressed"])
        for cases, said in (
            (check["ties"], "greedy decoding met ties that rounding decides"),
            (check["unexplained"], "greedy decoding differs from the teacher-forced prediction"),
        ):
            if cases:
                found.append(f"{name}: {said} ({', '.join(printable(case['prompt_id']) for case in cases)})")
    return found
