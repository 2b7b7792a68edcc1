"""What the terminal shows of tasks: the verdict for each use first, then the scores beside the dense ones."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from prunelens.errors import printable
from prunelens.report.terminal.screen import console
from prunelens.report.wording import DASH
from prunelens.study.evaluate.verdict import AT_RISK, BROKEN, SAFE

COLOURS = {SAFE: "bold green", AT_RISK: "bold yellow", BROKEN: "bold red"}
SHARES = {
    *("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"),
    *("ndcg_at_10", "recall_at_10", "overlap_at_10", "loops", "cut_by_limit"),
}
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
    for line in (*decoding_lines(info), *(f"Note: {note}" for note in info["notes"])):
        screen.print(Text(one_line(line)))


def decoding_lines(info: Mapping[str, Any]) -> list[str]:
    """Which rules written answers follow, where tasks of both kinds were run; nothing for results without it."""
    found = info.get("decoding")
    if not found or found["harness"].get("dense") is None or "core_long" not in info["tasks"]:
        return []
    return [
        "Written answers of harness tasks follow each checkpoint's own generation settings, as lm_eval itself does; "
        f"for core_long {found['others']}."
    ]


def verdict_table(summary: list[dict[str, Any]], dense: str) -> Table:
    """One line for each compressed model and class of use: the verdict and what decided it."""
    rules = dict.fromkeys(line["rule"] for record in summary for line in record["verdicts"] if line["rule"])
    table = Table(title=Text(f"can it replace {one_line(dense)}?"), caption=f"[95 % interval]; {'; '.join(rules)}")
    for name in ("", "use", "verdict", "decided by"):
        table.add_column(name, no_wrap=name in ("use", "verdict"))
    for record in summary:
        for place, line in enumerate(record["verdicts"]):
            label = Text(one_line(record["compressed"]) if place == 0 else "", overflow="fold")
            verdict = Text(one_line(line["verdict"]), COLOURS.get(line["verdict"], "dim"))
            table.add_row(label, Text(one_line(line["use"])), verdict, Text(one_line(why(line))))
        table.add_section()
    return table


def amount(found: Mapping[str, Any], share: bool) -> str:
    """A value with its interval, in percent or as it is; a dash where there is none."""
    mean = found["mean"] if "mean" in found else found["value"]
    if mean is None:
        return DASH
    ends = [mean] if found["low"] is None else [mean, found["low"], found["high"]]
    shown = [f"{100 * end:.1f}" if share else _plain(end) for end in ends]
    brackets = f" [{', '.join(shown[1:])}]" if shown[1:] else ""
    return f"{shown[0]}{' %' if share else ''}{brackets}".replace("-", "−")


def _plain(value: float) -> str:
    """A number with three decimals; large ones with none, and very large ones by their power of ten."""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"


def why(line: Mapping[str, Any]) -> str:
    """What decided a verdict, in one line."""
    if line["value"] is None:
        return str(line["reason"])
    text = f"{amount(line, line['rule'].endswith('%'))} {line['number']}, {line['source']}"
    return f"{text}; {line['reason']}" if line["reason"] else text


def scores_table(record: dict[str, Any]) -> Table:
    """One row for each metric: the dense score and its chance level first."""
    table = Table(
        title=Text(one_line(record["compressed"])),
        caption="flips: items right before and wrong after / wrong before and right after, with the sign test's p",
    )
    for name in ("task", "metric", "dense", "chance", "compressed", "difference [95 %]", "flips", ""):
        table.add_column(name, justify="left" if name in ("task", "metric", "") else "right")
    task = None
    for row in record["scores"]:
        first = row["task"] != task
        task = row["task"]
        label = Text(one_line(f"{task} ({row['items']})") if first else "")
        table.add_row(label, Text(one_line(row["metric"])), *map(Text, _cells(row)))
    return table


def one_line(text: str) -> str:
    """Text that cannot steer the terminal nor break a table's line."""
    return printable(text).replace("\n", "\N{REPLACEMENT CHARACTER}").replace("\t", " ")


def is_shown_as_share(row: Mapping[str, Any]) -> bool:
    """Whether the numbers of a row are shown in percent."""
    return str(row["metric"]).split("/")[0] in SHARES


def chance_words(row: Mapping[str, Any]) -> str:
    """The chance level of a row; `unknown` where higher is better and nobody knows it."""
    if row["chance"] is None:
        return "unknown" if row["better"] == "higher" else ""
    if not row["chance"]:
        return ""
    return f"{100 * row['chance']:.1f} %" if is_shown_as_share(row) else f"{row['chance']:.3f}"


def remark(row: Mapping[str, Any]) -> str:
    """What else a reader should know of a row."""
    chance = "dense at chance" if row["chance"] is not None else "dense may be 0"
    found = row.get("reason") or (chance if row["at_chance"] else "tie" if row["tie"] else "")
    how = row.get("aggregation", "mean")
    return "; ".join(filter(None, (found, "" if how == "mean" else f"by {how}")))


def _cells(row: dict[str, Any]) -> list[str]:
    share = is_shown_as_share(row)
    alone = [amount(row[side] | {"low": None}, share) for side in ("dense", "compressed")]
    flips = "" if row["lost"] is None else f"{row['lost']} / {row['gained']} (p {row['sign_test']:.2g})"
    difference = amount(row["difference"], share) if row["items"] else ""
    short = "not judged" if row.get("reason") and row["difference"]["mean"] is not None else remark(row)
    return [one_line(cell) for cell in (alone[0], chance_words(row), alone[1], difference, flips, short)]
