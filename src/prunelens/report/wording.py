"""Numbers and foreign strings as people read them; what cannot be told is a dash."""

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

DASH = "—"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SHOWN = {"\n": "↵\n", "\r": "␍", "\t": "⇥\t"}
_SPECIAL = re.compile(r"<[^\s<>]{1,40}>")


def number(value: float | None, digits: int = 3) -> str:
    """A number with this many significant digits, powers of ten written out."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 10**digits:
        return f"{value:,.0f}".replace("-", "−")
    if size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}".replace("-", "−")
    return f"{value:#.{digits}g}".rstrip(".").replace("-", "−")


def power_of_ten(power: int) -> str:
    """A power of ten: 10⁻⁴, 0.01, 1, 100."""
    return f"{10.0**power:g}" if -3 <= power <= 3 else f"10{str(power).translate(_SUPERSCRIPT)}"


def percent(value: float | None) -> str:
    """A share in percent with one decimal; never 0 or 100 unless it is."""
    if value is None or not math.isfinite(value):
        return DASH
    if 0 < value < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= value < 1:
        return "> 99.9 %"
    return f"{100 * value:.1f} %".replace("-", "−")


def in_words(seconds: float) -> str:
    """A span as people say it: 8 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def correlation_words(item: Mapping[str, Any]) -> str:
    """A rank correlation with its 95 % interval and over how many recipes it is; `undefined` where it is."""
    if item["rho"] is None:
        return f"undefined over {item['n']} recipes"
    low, high = item.get("low"), item.get("high")
    ends = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return f"{item['rho']:.2f}{ends} over {item['n']} recipes".replace("-", "−")


def count(value: float) -> str:
    """A count or a median of counts: 8, 1.5."""
    return f"{value:g}"


def setting(value: Any) -> str:
    """A setting as people write it: yes, no, lists without brackets."""
    if value is None or value == []:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    parts = value if isinstance(value, list | tuple) else [value]
    return shorten(", ".join(map(str, parts)), 120)


def interval(record: Mapping[str, Any], wording: Callable[[float | None], str] = number) -> str:
    """[low to high] of a 95 % interval, a common unit said once."""
    low, high = wording(record["low"]), wording(record["high"])
    if low == high:
        return f"[{low}]"
    if low[0].isdigit() and low.endswith(" %") and high.endswith(" %"):
        low = low.removesuffix(" %")
    return f"[{low} to {high}]"


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters on one line, the middle left out: names often differ at the end."""
    text = " ".join(visible(text).split())
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 1]}…{text[-tail:]}"


def visible(text: str) -> str:
    """Text with line ends, tabs, control and direction characters shown."""
    if not text:
        return "∅"
    if text.isprintable():  # nothing that is shown otherwise is
        return text
    return "".join(_visible_character(character) for character in text)


def word(token: str) -> str:
    """A token standing alone: blanks shown, on one line."""
    return visible(token).replace("\n", "") if token.strip(" ") or not token else "␣" * len(token)


def _visible_character(character: str) -> str:
    if character in _SHOWN:
        return _SHOWN[character]
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"⟨U+{ord(character):04X}⟩"
    return character


def is_special(token: str) -> bool:
    """Whether a token looks like a marker of the tokenizer, such as <|im_end|>."""
    return _SPECIAL.fullmatch(token) is not None


def expectation(found: Mapping[str, Any]) -> str:
    """What a forecast says of one class of use, never in a verdict's word (F1)."""
    use = str(found["use"]).replace("-", " ")
    if found["refused"]:
        return f"{use}: no forecast, {found['refused']}"
    source = f"(90 % interval; forecast from {found['predictor']}, {found['cells']} recipes of this model)"
    if not found["bounded"]:
        low, value, high = (f"{found[end]:+.2f}" for end in ("low", "value", "high"))
        return f"{use}: expected excess of {value} nats per token [{low}, {high}] {source}"
    kept, low, high = (100 * (1 - found[end]) for end in ("value", "high", "low"))
    return f"{use}: expected to keep {kept:.0f} % [{low:.0f}, {high:.0f}] {source}"
