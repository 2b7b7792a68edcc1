"""How fast and how large models are: a table for the terminal, and the same for machines."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from prunelens.errors import printable
from prunelens.report.terminal.screen import closing, console, lean_table
from prunelens.report.wording import DASH, number, percent, shorten
from prunelens.study.benchmark.record import Speed, Spread

LABEL_WIDTH = 22
FIRST_COLUMN = 20
"""Characters of the columns."""
STATES = "states per row"
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def speeds_as_json(speeds: list[Speed]) -> dict[str, Any]:
    """What was measured, in base units (bytes, tokens per second), the dense model first.

    Returns:
        `settings` and `models`, one record for each with the fields of `Speed`.
    """
    models = [asdict(speed) for speed in speeds]
    for model in models:
        del model["settings"]
        model["notes"] = list(model["notes"])
    return {"settings": asdict(speeds[0].settings), "models": models}


def print_speeds(speeds: list[Speed], seconds: float | None = None) -> None:
    """Print what was measured, as many tables as the width asks for, and what should be known of each model."""
    screen = console()
    asked = speeds[0].settings
    rows = f"{asked.batch_size} {'row' if asked.batch_size == 1 else 'rows'}"
    title = f"{rows} of {asked.context} tokens and {asked.new_tokens} new ones, {asked.repeats} repeats in turn\n"
    screen.print(Text(title, style="bold"))
    for shown in _by_width(speeds, screen.width):
        screen.print(speed_table(shown, speeds[0]))
    screen.print(Text("median, times the dense model's [lowest, highest of the repeats]\n", style="dim"))
    for remark in _remarks(speeds):
        screen.print(Text(remark, style="dim"))
    closing(screen, None, (), seconds, "")


def _by_width(speeds: list[Speed], width: int) -> list[list[Speed]]:
    each = max(1, (width - FIRST_COLUMN) // (LABEL_WIDTH + 1))
    return [speeds[start : start + each] for start in range(0, len(speeds), each)]


def speed_table(shown: list[Speed], dense: Speed) -> Table:
    """One column for each model; ratios are to the dense one."""
    table = lean_table()
    table.add_column("", min_width=FIRST_COLUMN - 1)
    for speed in shown:
        table.add_column(Text(shorten(printable(speed.label), LABEL_WIDTH)), justify="right", overflow="fold")
    for name, show in ROWS:
        if name == STATES and not (dense.state_bytes or any(speed.state_bytes for speed in shown)):
            continue
        table.add_row(name, *[Text(show(speed, dense)) for speed in shown])
    return table


Show = Callable[[Speed, Speed], str]


def _rate(name: str) -> Show:
    def show(speed: Speed, dense: Speed) -> str:
        rate: Spread = getattr(speed, f"{name}_tokens_per_second")
        ratio: Spread | None = getattr(speed, f"{name}_ratio")
        if ratio is None:
            return f"{number(rate.median)}\n[{number(rate.low)}, {number(rate.high)}]"
        return f"{number(rate.median)}\n{_times(ratio.median)} [{_plain(ratio.low)}, {_plain(ratio.high)}]"

    return show


def _size(name: str) -> Show:
    def show(speed: Speed, dense: Speed) -> str:
        size, base = getattr(speed, name), getattr(dense, name)
        if size is None or speed is dense or not base:
            return size_in_words(size)
        return f"{size_in_words(size)} {_times(size / base)}"

    return show


def size_in_words(size: int | float | None) -> str:
    """Bytes as people read them: 0 B, 576 B, 513 MiB."""
    if size is None:
        return DASH
    power = 0
    while size >= 1024 and power < len(UNITS) - 1:
        size /= 1024
        power += 1
    return f"{size:.4g} {UNITS[power]}"


def _times(ratio: float) -> str:
    return f"{_plain(ratio)}×"


def _plain(ratio: float) -> str:
    return f"{ratio:.2f}"


ROWS: list[tuple[str, Show]] = [
    ("prefill, tokens/s", _rate("prefill")),
    ("decoding, tokens/s", _rate("decode")),
    ("peak memory", _size("peak_memory_bytes")),
    ("KV cache per token", _size("kv_bytes_per_token")),
    (STATES, _size("state_bytes")),
    ("weights in memory", _size("weight_bytes_in_memory")),
    ("weights on disk", _size("weight_bytes_stored")),
    ("zeros in matrices", lambda speed, dense: percent(speed.zero_fraction)),
]


def _remarks(speeds: list[Speed]) -> list[str]:
    places = dict.fromkeys(f"{speed.device}, {speed.dtype}" for speed in speeds)
    remarks = [f"measured on {'; '.join(places)}"]
    sources = dict.fromkeys(speed.memory_source for speed in speeds if speed.memory_source is not None)
    if sources:
        remarks.append(f"peak memory: weights in memory and what one run added ({'; '.join(sources)})")
    else:
        remarks.append("peak memory: it cannot be measured on this system")
    remarks.append("weights on disk: the files of a model, or what `prunelens prune` would write of a recipe's result")
    if len(speeds) > 1 and speeds[0].settings.repeats < FEW_REPEATS:
        remarks.append("so few repeats can all differ by chance; pass --repeats 5 or more")
    remarks += [f"{speed.label}: {note}" for speed in speeds for note in speed.notes]
    return [printable(remark) for remark in remarks]


FEW_REPEATS = 5
"""Below this, equal models are often slower or faster in all of them: in 2 of 2^repeats cases."""
