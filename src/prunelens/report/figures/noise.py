"""The noise floor (N1): where it stands in a figure, and the table of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunelens.report.figures.drawing import HALO, INK, MUTED, plot_text
from prunelens.report.wording import DASH, number, percent, visible

HALF = ("bfloat16", "float16")
KL = "kl_dense_compressed"
COLUMNS = (
    ("KL, nats", KL),
    ("TV", "tv"),
    ("1 − cosine of h", "hidden_deviation"),
    ("1 − cosine of z", "logit_deviation"),
    ("1 − cosine of p", "prob_deviation"),
    ("same top-1", "same_top1"),
)


@dataclass(frozen=True)
class NoiseRow:
    """One quantity of the dense model against itself under one change of arithmetic, over the tokens sampled."""

    against: str
    quantity: str
    mean: str
    p95: str
    largest: str


def noise_rows(info: Mapping[str, Any]) -> list[NoiseRow]:
    """One row per change of arithmetic and quantity that was measured."""
    return [
        _row(against, quantity, found[name])
        for against, found in (info.get("noise") or {}).items()
        for quantity, name in COLUMNS
        if found.get(name)
    ]


def _row(against: str, quantity: str, found: Mapping[str, float]) -> NoiseRow:
    if "max" not in found:
        return NoiseRow(against, quantity, percent(found["mean"]), DASH, DASH)
    if found["max"] == 0:
        return NoiseRow(against, quantity, "0, bit-equal", "0", "0")
    return NoiseRow(against, quantity, *(number(found[key]) for key in ("mean", "p95", "max")))


def noise_sentence(info: Mapping[str, Any]) -> str:
    """The noise floor of the KL, and what it does not cover; nothing where it was not measured."""
    parts = [
        f"{visible(against)}: {_kl_words(found[KL])}"
        for against, found in (info.get("noise") or {}).items()
        if found.get(KL)
    ]
    if not parts:
        return ""
    where = sampled_at(info)
    return (
        f"Noise floor, the dense model against itself{where} (KL mean): {'; '.join(parts)}. {of_reading(info)}".rstrip()
    )


def sampled_at(info: Mapping[str, Any]) -> str:
    """At how many positions the noise floor was measured; nothing where it was at all of them."""
    found = info.get("noise_sample")
    if not found or found["positions"] == found["of"]:
        return ""
    return f" at {found['positions']:,} of {found['of']:,} positions"


def of_reading(info: Mapping[str, Any]) -> str:
    """What the noise floor does not cover in a dtype in which near ties are common; nothing in others."""
    dtype = (info.get("dense") or {}).get("dtype")
    if dtype not in HALF:
        return ""
    return (
        f"It is the noise of reading given texts. What is written in {dtype} may differ with another batch size: near "
        "ties are common, and one token chosen otherwise changes all that follow."
    )


def _kl_words(found: Mapping[str, float]) -> str:
    return "0, bit-equal" if found["max"] == 0 else f"{number(found['mean'])} nats"


def floor_lines(
    info: Mapping[str, Any], name: str, ends: Sequence[float], yaxis: Mapping[str, Any], **more: Any
) -> list[dict[str, Any]]:
    """Dotted lines at the 95th percentile of a column, where the axis shows it; nothing is stretched."""
    return [
        _line(f"noise floor ({plot_text(against)})", found[name]["p95"], ends) | more
        for against, found in (info.get("noise") or {}).items()
        if found.get(name) and _where(found[name]["p95"], yaxis) == "inside"
    ]


def _line(name: str, value: float, ends: Sequence[float]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "x": np.array(ends, dtype=float),
        "y": np.array([value, value]),
        "mode": "lines+text",
        "text": ["", name],
        "textposition": "top left",
        "textfont": {"size": 11, "color": INK, "shadow": HALO},
        "line": {"color": MUTED, "width": 1.3, "dash": "dot"},
        "name": name,
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _where(value: float, yaxis: Mapping[str, Any]) -> str:
    """Whether an axis shows a value, or what keeps it from that."""
    low, high = yaxis["range"]
    if yaxis.get("type") == "log":
        low, high = 10**low, 10**high
        if value <= 0:
            return "zero"
    elif value <= low + 0.015 * (high - low):
        return "below"
    return "below" if value <= low else "above" if value >= high else "inside"


_ENDINGS = {
    "below": " (below the axis)",
    "above": " (above the axis: what is drawn lies under the noise)",
    "zero": "",
    "inside": "",
}


def floor_note(
    info: Mapping[str, Any], names: Mapping[str, str], yaxis: Mapping[str, Any] | None = None, unit: str = ""
) -> str:
    """The 95th percentiles in words, and which of them the axis does not show.

    Args:
        info: the content of run.json.
        names: what each column is called in the figure, and the column.
        yaxis: the axis that the values would stand on, if there is one.
        unit: follows a number.
    """
    found = [_floor_words(against, item, names, yaxis, unit) for against, item in (info.get("noise") or {}).items()]
    said = "; ".join(item for item in found if item)
    return f"Noise floor, 95th percentile, {said}." if said else ""


def _floor_words(
    against: str, item: Mapping[str, Any], names: Mapping[str, str], yaxis: Mapping[str, Any] | None, unit: str
) -> str:
    known = {short: item[name] for short, name in names.items() if item.get(name)}
    if not known:
        return ""
    if all(values["max"] == 0 for values in known.values()):
        return f"{visible(against)}: 0, bit-equal"
    endings = {short: _ENDINGS[_where(values["p95"], yaxis)] if yaxis else "" for short, values in known.items()}
    common = endings.popitem()[1] if len(set(endings.values())) == 1 else None
    words = [
        f"{short} {_quantile(values, unit)}{'' if common is not None else endings[short]}".strip()
        for short, values in known.items()
    ]
    if common and len(words) > 1:
        common = common.replace("(", "(all ", 1)
    return f"{visible(against)}: {', '.join(words)}{common or ''}"


def _quantile(values: Mapping[str, float], unit: str) -> str:
    return "0 (bit-equal)" if values["max"] == 0 else f"{number(values['p95'], 2)}{unit}"
