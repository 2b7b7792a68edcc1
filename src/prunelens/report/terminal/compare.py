"""What the terminal shows: progress with ETA, the answer as a table, and the first prompt side by side."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from rich.console import Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from prunelens.errors import printable
from prunelens.report.figures.noise import of_reading
from prunelens.report.terminal.evaluate import verdict_table
from prunelens.report.terminal.screen import console
from prunelens.study.compare.summary import by_damage_per_byte, free_agreement, texts_of
from prunelens.study.evaluate.verdict import predict


@contextmanager
def progress() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """A progress display on stderr; the body gets a reporter for `compare`."""
    screen = console(sys.stderr)  # the stream itself: the harness's own bars are kept off `sys.stderr`
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as display:

        def reporter(stage: str, total: int) -> Callable[[int], None]:
            task = display.add_task(printable(stage), total=total)
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                done += count
                display.update(task, completed=min(done, total))

            return advance

        yield reporter
        for task in display.tasks:  # texts that ended early leave their bars short
            display.update(task.id, completed=task.total)


def print_result(tables: dict[str, pa.Table], info: dict[str, Any]) -> None:
    """The answer first, then what was noticed, then the first prompt side by side."""
    screen = console()
    if len(info["summary"]) > 1:
        screen.print(size_table(info))
    for table in answer_tables(info, screen.width):
        screen.print(table)
    for remark in [*_remarks(info), *_noise(info)]:
        screen.print(Text(remark, style="dim"))
    for record in info["summary"]:
        if record["attribution"]:
            screen.print(_attribution_table(record))
    screen.print(_predicted(info))
    screen.print(_side_by_side(tables, info))


def print_advice(summary: list[dict[str, Any]]) -> None:
    """Two sentences on what to look at, from the mildest of the compressed models."""
    mild = min(summary, key=lambda record: record["kl"]["mean"])
    text = (
        f"\nLook first at the rows of S(n): {printable(mild['compressed'])} picks the same next token "
        f"{100 * mild['same_top1']['mean']:.0f} % of the time, and yet half of its texts have parted from the dense "
        f"model's after {_faithful(mild)}. Then open the page, choose a prompt and move over the coloured tokens: the "
        "damage sits in a few steps, not in the mean."
    )
    console().print(Text(text))


def size_table(info: dict[str, Any]) -> Table:
    """One row per compressed model, least damage per byte saved first."""
    table = Table(
        title=Text("sorted by damage per byte saved"),
        caption="bytes of the weights that are read, or of a checkpoint's files",
    )
    for name in ("", "MB", "saved", "zeros", "KL per token", "KL per 1 % of bytes"):
        table.add_column(name, justify="right" if name else "left")
    for record in by_damage_per_byte(info["summary"]):
        size = record["size"]
        per = size["kl_per_percent"]
        table.add_row(
            Text(printable(record["compressed"]), overflow="fold"),
            f"{size['bytes'] / 1e6:.1f}",
            "nothing" if per is None else f"{100 * size['saved']:.1f} %",
            f"{100 * size['zeros']:.1f} %",
            f"{record['kl']['mean']:.4f}",
            "" if per is None else f"{per:.2g}",
        )
    return table


def answer_tables(info: dict[str, Any], width: int) -> list[Table]:
    """One column per compressed model, one row per question; as many tables as the width asks for."""
    summary = info["summary"]
    prompts = summary[0]["greedy_check"]["prompts"]
    each = max(1, (width - FIRST_COLUMN) // NEXT_COLUMN)
    tables = []
    for start in range(0, len(summary), each):
        title = f"{printable(info['dense']['name'])} against {len(summary)} compressed, {prompts} prompts"
        table = Table(title=Text(title), caption="[95 % interval over prompts]", show_lines=False)
        table.add_column("")
        for record in summary[start : start + each]:
            table.add_column(Text(printable(record["compressed"]), overflow="fold"), justify="right")
        for name, show in ROWS:
            table.add_row(name, *[Text(show(record)) for record in summary[start : start + each]])
        tables.append(table)
    return tables


FIRST_COLUMN, NEXT_COLUMN = 33, 15
"""Characters of the answer table's columns, at least."""
NUM_PARTS = 5
"""How many of the most and of the least damaging parts the terminal shows."""


def _survival(n: str) -> Callable[[dict[str, Any]], str]:
    def show(record: dict[str, Any]) -> str:
        found = record["survival"].get(n)
        return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if found else "text too short"

    return show


def _faithful(record: dict[str, Any]) -> str:
    found = record["faithful_length"]
    unit = "token" if found["median"] == 1 else "tokens"
    return f"{'≥ ' if found['beyond_horizon'] else ''}{found['median']} {unit}"


def _agreed(record: dict[str, Any]) -> str:
    found = record["faithful_length"]["expected"]
    return f"{found['mean']:.1f} [{found['low']:.1f}, {found['high']:.1f}]"


def _divergent(record: dict[str, Any]) -> str:
    found = record["first_divergent_token"]
    if found["median"] is None:
        return f"none in {found['never']} of {found['prompts']}"
    return f"{found['median']:g}"


def _options(record: dict[str, Any]) -> str:
    found = record["options"]
    return f"{found['same_choice']} of {found['prompts']}" if found else "no such prompts"


def _drafted(record: dict[str, Any]) -> str:
    found = record["draft"]
    measured = found.get("measured")
    return f"{found['speedup']:.2f} / {measured['speedup']['value']:.2f}" if measured else f"{found['speedup']:.2f} / -"


ROWS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("parameters saved", lambda record: f"{100 * record['parameters_saved']:.2f} %"),
    (
        "KL per token, mean (nats)",
        lambda record: f"{record['kl']['mean']:.4f} [{record['kl']['low']:.4f}, {record['kl']['high']:.4f}]",
    ),
    ("KL, 95th percentile (nats)", lambda record: f"{record['kl']['p95']:.4f}"),
    ("same top-1", lambda record: f"{100 * record['same_top1']['mean']:.1f} %"),
    ("same multiple choice", _options),
    ("S(8): 8 sampled tokens agree", _survival("8")),
    ("S(32)", _survival("32")),
    ("faithful length, S(n) ≥ ½", _faithful),
    ("expected agreed tokens", _agreed),
    ("first divergent token, greedy", _divergent),
    ("draft speed-up, predicted / measured", _drafted),
]


def _remarks(info: dict[str, Any]) -> list[str]:
    remarks = [printable(note) for note in info["notes"]]
    for record in info["summary"]:
        check = record["greedy_check"]
        name = printable(record["compressed"])
        if check["ties"]:
            ids = ", ".join(printable(tie["prompt_id"]) for tie in check["ties"])
            remarks.append(f"{name}: greedy decoding met ties that rounding decides ({ids})")
        if check["unexplained"]:
            ids = ", ".join(printable(case["prompt_id"]) for case in check["unexplained"])
            remarks.append(f"{name}: greedy decoding differs from the teacher-forced prediction on {ids}")
    return remarks


def _noise(info: dict[str, Any]) -> list[str]:
    """How much arithmetic alone changes the dense model (N1)."""
    found = []
    for against, spread in info["noise"].items():
        kl, tv = spread["kl_dense_compressed"], spread["tv"]
        if kl is None or tv is None:
            continue
        size = (
            f"KL {kl['mean']:.2g} nats in the mean, at most {kl['max']:.2g}; TV at most {tv['max']:.2g}"
            if tv["max"]
            else "0, bit-equal"
        )
        found.append(f"noise floor, dense against itself, another {_changed(against)}: {size}")
    beyond = of_reading(info)
    return [*found, beyond] if found and beyond else found


def _changed(against: str) -> str:
    return against if against == "batch shape" else f"dtype ({against})"


def _attribution_table(record: dict[str, Any]) -> Table:
    """D1: the most and the least damaging parts alone, with what cosine says of them."""
    found = record["attribution"]
    parts = sorted(found["parts"], key=lambda part: -part["kl"]["mean"])
    shown = parts if len(parts) <= 2 * NUM_PARTS else [*parts[:NUM_PARTS], None, *parts[-NUM_PARTS:]]
    shown += [part for part in parts if part["changed"] and part not in shown]
    table = Table(title=Text(f"damage at the end, each sublayer compressed alone: {printable(record['compressed'])}"))
    for name in ("sublayer", "KL alone, nats", "KL all but it", "cosine", "compressed"):
        table.add_column(name, justify="left" if name == "sublayer" else "right")
    for part in shown:
        table.add_row(*(_attributed(part) if part else ["…"] * 5))
    notes = [f"KL of all together {found['kl_all']:.4f}, sum of the compressed alone {found['sum_alone']:.4f}"]
    for kind, correlation in found["rank_correlation"].items():
        if correlation["rho"] is not None:
            notes.append(
                f"{kind}: rank correlation of 1 - cosine with the damage {correlation['rho']:.2f} "
                f"({correlation['n']} sublayers)"
            )
    table.caption = "; ".join(notes)
    return table


def _attributed(part: dict[str, Any]) -> list[str]:
    place = part["sublayer"] if part["layer_idx"] is None else f"{part['sublayer']} {part['layer_idx']}"
    kl, all_but, cosine = part["kl"], part["kl_all_but"], part["redundancy"]
    return [
        place,
        f"{kl['mean']:.4f} [{kl['low']:.4f}, {kl['high']:.4f}]",
        f"{all_but['mean']:.4f}" if all_but else "",
        f"{cosine:.4f}" if cosine is not None else "",
        "yes" if part["changed"] else "",
    ]


def _predicted(info: dict[str, Any]) -> Table:
    """What the comparison predicts for each class of use; tasks measure it."""
    summary = [
        {"compressed": record["compressed"], "verdicts": [line.as_dict() for line in predict(record)]}
        for record in info["summary"]
    ]
    table = verdict_table(summary, info["dense"]["name"])
    table.title = Text("predicted for each use; `prunelens evaluate` measures it")
    return table


def _side_by_side(tables: dict[str, pa.Table], info: dict[str, Any]) -> Group:
    prompt = tables["prompts"].slice(0, 1).to_pylist()[0]
    key = prompt["prompt_id"]
    parts: list[Any] = [Panel(Text(printable(prompt["text"])), title="first prompt", title_align="left")]
    dense = texts_of(tables, "dense")[key]
    parts.append(Panel(Text(_shown(dense["tokens"], dense["ended"])), title="dense", title_align="left"))
    for record in info["summary"]:
        label = record["compressed"]
        own = texts_of(tables, label)[key]
        agreed = min(free_agreement(tables, label)[key], len(own["tokens"]))
        text = Text(_shown(own["tokens"][:agreed], own["ended"] and agreed == len(own["tokens"])))
        if agreed < len(own["tokens"]):
            text.append("⟂", style="bold red")
            text.append(_shown(own["tokens"][agreed:], own["ended"]), style="red")
        parts.append(Panel(text, title=Text(printable(label)), title_align="left"))
    return Group(*parts)


def _shown(tokens: list[str], ended: bool) -> str:
    kept = tokens[:-1] if ended else tokens
    return printable("".join(kept)) + (" ⏹" if ended else "")
