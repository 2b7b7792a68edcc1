"""What the terminal shows of tasks: the verdict for each use first, then the scores beside the dense ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from prunelens.report.task_words import (
    amount,
    chance_words,
    decoding_lines,
    is_shown_as_share,
    items_words,
    null_lines,
    one_line,
    remark,
    why,
)
from prunelens.report.terminal.screen import closing, console, lean_table
from prunelens.study.evaluate.words import BROKEN, DEGRADED, SAFE, UNDECIDED

COLOURS = {SAFE: "bold green", DEGRADED: "bold yellow", BROKEN: "bold red", UNDECIDED: "bold blue"}
"""Each word says by itself what its colour says."""


def print_evaluation(
    info: dict[str, Any],
    page: Path | None = None,
    seconds: float | None = None,
    following: str = "",
    full: bool = False,
) -> None:
    """Print the screen: the verdicts of every compressed model for every use; with `full` every score too.

    Args:
        info: the content of run.json.
        page: where the page lies.
        seconds: that the command took.
        following: the next command worth running.
        full: what decided each verdict, and a table of scores for each model.
    """
    screen = console()
    screen.print(Text(f"Can it replace {one_line(info['dense']['name'])}?\n", style="bold"))
    screen.print(verdict_matrix(info["summary"]))
    screen.print(Text(f"{rules_in_words(info['summary'])}\n", style="dim"))
    if full:
        screen.print(verdict_table(info["summary"]))
        for record in info["summary"]:
            screen.print(Text(f"\n{one_line(record['compressed'])}", style="bold"), scores_table(record), sep="\n")
        screen.print(Text(FLIPS, style="dim"))
    closing(screen, page, [*_limit_lines(info), *decoding_lines(info), *info["notes"]], seconds, following)


FLIPS = "flips: items right before and wrong after / wrong before and right after, with the sign test's p"
SHORT = {"multiple-choice": "choice", "short-generation": "short texts", "long-generation": "long texts"}
"""Classes of use as headings."""


def verdict_matrix(summary: list[dict[str, Any]]) -> Table:
    """One row per compressed model, one column per class of use: the verdict above what decided it."""
    table = lean_table()
    table.add_column("", overflow="fold", min_width=16)
    for line in summary[0]["verdicts"]:
        table.add_column(Text(SHORT.get(line["use"], one_line(line["use"]))), no_wrap=True)
    for record in summary:
        table.add_row(Text(one_line(record["compressed"])), *map(_matrix_cell, record["verdicts"]))
    return table


def _matrix_cell(line: Mapping[str, Any]) -> Text:
    verdict = one_line(line["verdict"])
    cell = Text(verdict, COLOURS.get(verdict, "dim"))
    if line["value"] is None:
        return cell
    share, sign = line["rule"].endswith("%"), "" if "≥" in line["rule"] else "+"
    unit = " nats" if not share else " % {'atypical' if 'atypical' in line['number'] else 'loop'}" if sign else " %"
    ends = [_brief(line[name], share) for name in ("value", "low", "high") if line[name] is not None]
    brackets = f"\n[{', '.join(ends[1:])}]" if ends[1:] else ""
    plus = sign if line["value"] >= 0 else ""
    cell.append(f"\n{plus}{ends[0]}{unit}{brackets}".replace("-", "−"), "none")
    return cell.append(_items_words(line), "dim")


def _items_words(line: Mapping[str, Any]) -> str:
    """How many items decided, or would."""
    if line.get("stopped_early"):
        return f"\n{line['used']} of {line['there']} items"
    return f"\n≈ {line['more']:,} more" if line.get("more") else ""


def _brief(value: float, share: bool) -> str:
    return f"{100 * value:.0f}" if share else f"{value:.2g}"


def rules_in_words(summary: list[dict[str, Any]]) -> str:
    """What the verdicts mean: their rules, each once."""
    rules = dict.fromkeys(line["rule"] for record in summary for line in record["verdicts"] if line["rule"])
    lines = [line for record in summary for line in record["verdicts"]]
    more = "; ≈: so many more items would decide" if any(line.get("more") for line in lines) else ""
    used = (
        "; n of m items: decided before the others were run" if any(line.get("stopped_early") for line in lines) else ""
    )
    return f"[95 % interval]; {'; '.join(rules)}{more}{used}" if rules else "Nothing was measured for any use."


def _limit_lines(info: Mapping[str, Any]) -> list[str]:
    cut = [row for record in info["summary"] for row in record["scores"] if row["metric"] == "cut_by_limit"]
    if not cut:
        return []
    return [
        f"core_long: the limit of {info['settings']['long_tokens']} tokens cut {100 * cut[0]['dense']['mean']:.0f} % "
        "of the dense model's texts; a text that is cut has no end to judge.",
        *null_lines(info),
    ]


def verdict_table(summary: list[dict[str, Any]]) -> Table:
    """One line for each compressed model and class of use: the verdict and what decided it."""
    table = lean_table()
    for name in ("", "use", "verdict", "decided by"):
        table.add_column(name, no_wrap=name == "verdict", overflow="fold")
    for record in summary:
        for place, line in enumerate(record["verdicts"]):
            label = Text(one_line(record["compressed"]) if place == 0 else "")
            verdict = Text(one_line(line["verdict"]), COLOURS.get(line["verdict"], "dim"))
            table.add_row(label, Text(one_line(line["use"])), verdict, Text(one_line(why(line))))
    return table


def scores_table(record: dict[str, Any]) -> Table:
    """Two lines for each metric: its scores and their difference, and below what a reader should know of it."""
    table = lean_table()
    table.add_column("task and metric", overflow="fold", min_width=16)
    for name in ("dense", "compressed", "difference [95 %]", "flips"):
        table.add_column(name, justify="right", no_wrap=True)
    task = None
    for row in record["scores"]:
        first = row["task"] != task
        task = row["task"]
        if first:
            table.add_row(Text(one_line(f"{task} ({items_words(row)})"), "bold"))
        dense, chance, compressed, difference, flips, short = _cells(row)
        below = "; ".join(filter(None, (f"chance {chance}" if chance else "", short)))
        label = Text(f"  {one_line(row['metric'])}").append(f"\n  {below}" if below else "", "dim")
        table.add_row(label, Text(dense), Text(compressed), Text(difference.replace(" [", "\n[")), Text(flips))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    share = is_shown_as_share(row)
    alone = [amount(row[side] | {"low": None}, share) for side in ("dense", "compressed")]
    flips = "" if row["lost"] is None else f"{row['lost']} / {row['gained']} (p {row['sign_test']:.2g})"
    difference = amount(row["difference"], share) if row["items"] else ""
    short = "not judged" if row.get("reason") and row["difference"]["mean"] is not None else remark(row)
    return [one_line(cell) for cell in (alone[0], chance_words(row), alone[1], difference, flips, short)]
