"""What the terminal shows of tasks: the verdict for each use first, then the scores beside the dense ones."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from prunelens.errors import printable
from prunelens.report.screen import console
from prunelens.study.verdict import AT_RISK, BROKEN, SAFE

COLOURS = {SAFE: "bold green", AT_RISK: "bold yellow", BROKEN: "bold red"}
SHARES = {"acc", "acc_norm", "exact_match", "ndcg_at_10", "recall_at_10", "overlap_at_10", "loops", "cut_by_limit"}
UNITS = {
    "nll_dense": "nats per token that the dense model needs for the text",
    "length": "tokens",
    "distinct_3": "distinct 3-grams, share",
    "neighbour_correlation": "rank correlation of all passages' similarities",
}


def print_evaluation(info: dict[str, Any]) -> None:
    """The verdicts of every compressed model, then a table of scores for each."""
    screen = console()
    screen.print(verdict_table(info["summary"], info["dense"]["name"]))
    for record in info["summary"]:
        screen.print(scores_table(record))
    cut = [row for record in info["summary"] for row in record["scores"] if row["metric"] == "cut_by_limit"]
    if cut:
        whole, items = round(cut[0]["dense"]["mean"] * cut[0]["items"]), cut[0]["items"]
        screen.print(
            f"core_long: the limit of {info['settings']['long_tokens']} tokens cut {whole} of the dense model's "
            f"{items} texts; a text that is cut has no end to judge."
        )
    for note in info["notes"]:
        screen.print(Text(f"Note: {printable(note)}"))


def verdict_table(summary: list[dict[str, Any]], dense: str) -> Table:
    """One line for each compressed model and class of use: the verdict and what decided it."""
    rules = dict.fromkeys(line["rule"] for record in summary for line in record["verdicts"] if line["rule"])
    table = Table(title=Text(f"can it replace {printable(dense)}?"), caption=f"[95 % interval]; {'; '.join(rules)}")
    for name in ("", "use", "verdict", "decided by"):
        table.add_column(name, no_wrap=name in ("use", "verdict"))
    for record in summary:
        for place, line in enumerate(record["verdicts"]):
            label = Text(printable(record["compressed"]) if place == 0 else "", overflow="fold")
            verdict = Text(line["verdict"], COLOURS.get(line["verdict"], "dim"))
            table.add_row(label, line["use"], verdict, Text(printable(why(line))))
        table.add_section()
    return table


def amount(found: Mapping[str, Any], share: bool) -> str:
    """A value with its interval, in percent or as it is."""
    mean = found["mean"] if "mean" in found else found["value"]
    scale, digits, unit = (100, 1, " %") if share else (1, 3, "")
    low, high = scale * found["low"], scale * found["high"]
    return f"{scale * mean:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]".replace("-", "−")


def why(line: Mapping[str, Any]) -> str:
    """What decided a verdict, in one line."""
    if line["value"] is None:
        return str(line["reason"])
    text = f"{amount(line, line['rule'].endswith('%'))} {line['number']}, {line['source']}"
    return f"{text}; {line['reason']}" if line["reason"] else text


def scores_table(record: dict[str, Any]) -> Table:
    """One row for each metric: the dense score and its chance level first."""
    table = Table(
        title=Text(printable(record["compressed"])),
        caption="flips: items right before and wrong after / wrong before and right after, with the sign test's p",
    )
    for name in ("task", "metric", "dense", "chance", "compressed", "difference [95 %]", "flips", ""):
        table.add_column(name, justify="left" if name in ("task", "metric", "") else "right")
    task = None
    for row in record["scores"]:
        first = row["task"] != task
        task = row["task"]
        table.add_row(Text(f"{printable(task)} ({row['items']})" if first else ""), row["metric"], *_cells(row))
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    share = row["metric"].split("/")[0] in SHARES
    shown = (lambda value: f"{100 * value:.1f} %") if share else (lambda value: f"{value:.3f}")
    difference = row["difference"]
    flips = "" if row["lost"] is None else f"{row['lost']} / {row['gained']} (p {row['sign_test']:.2g})"
    remark = "at chance" if row["at_chance"] else "tie" if row["tie"] else ""
    return [
        shown(row["dense"]["mean"]),
        shown(row["chance"]) if row["chance"] else "",
        shown(row["compressed"]["mean"]),
        amount(difference, share) if row["items"] else "",
        flips,
        remark,
    ]
