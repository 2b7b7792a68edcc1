"""Verdicts and scores in words, for the terminal and the pages."""

from collections.abc import Mapping
from typing import Any

from prunelens.errors import printable
from prunelens.report.wording import DASH

SHARES = {
    *("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"),
    *("ndcg_at_10", "recall_at_10", "overlap_at_10", "loops", "cut_by_limit", "atypical", "unclosed_thinking"),
}
UNITS = {
    "excess_nll": "nats per token that the dense model needs beyond what it expects",
    "nll_dense": "nats per token that the dense model needs for the text",
    "length": "tokens",
    "distinct_3": "distinct 3-grams, share",
    "neighbour_correlation": "rank correlation of all passages' similarities",
}


def decoding_lines(info: Mapping[str, Any]) -> list[str]:
    """Which rules written answers follow, where tasks of both kinds were run; nothing for results without it."""
    found = info.get("decoding")
    if not found or found["harness"].get("dense") is None or "core_long" not in info["tasks"]:
        return []
    return [
        "Written answers of harness tasks follow each checkpoint's own generation settings, as lm_eval itself does; "
        f"for core_long {found['others']}."
    ]


def null_lines(info: Mapping[str, Any]) -> list[str]:
    """How far the dense model's long texts differ from its own drawn once more; nothing for results without it."""
    found = {row["metric"]: row for row in info.get("null", ()) if row["difference"]["mean"] is not None}
    shown = [
        f"{name} {amount(found[name]['difference'], is_shown_as_share(found[name]))}"
        for name in ("excess_nll", "atypical", "loops", "length")
        if name in found
    ]
    if not shown:
        return []
    return [f"core_long: the dense model against itself, drawn with other numbers: {', '.join(shown)}."]


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


def items_words(row: Mapping[str, Any]) -> str:
    """How many items a score is of, and how many there are where not all were run."""
    items, there = row["items"], row.get("there")
    return f"{items} of {there}" if there and there != items else f"{items}"


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
