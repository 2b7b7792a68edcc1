"""What `compare --full` shows beyond one screen: sizes, every number of the answer, noise and attribution."""

from collections.abc import Callable
from typing import Any

from rich.table import Table
from rich.text import Text

from prunelens.errors import printable
from prunelens.report.figures.noise import of_reading, sampled_at
from prunelens.report.terminal.screen import console, lean_table
from prunelens.study.compare.summary import by_damage_per_byte


def print_full(info: dict[str, Any]) -> None:
    """Print sizes, every number of the answer, the noise floor and the attribution."""
    screen = console()
    screen.print(Text("\nSizes of the weights that are read, or of files", "bold"), size_table(info), sep="\n")
    screen.print(Text("\nEvery number, with 95 % intervals over prompts", "bold"))
    for table in answer_tables(info, screen.width):
        screen.print(table)
    for remark in _noise(info):
        screen.print(Text(remark, style="dim"))
    for record in info["summary"]:
        if record["attribution"]:
            title = f"\nDamage at the end, each sublayer compressed alone: {printable(record['compressed'])}"
            screen.print(Text(title, "bold"), _attribution_table(record), sep="\n")
            screen.print(Text(_attribution_notes(record["attribution"]), style="dim"))


def size_table(info: dict[str, Any]) -> Table:
    """One row per compressed model, least damage per byte saved first."""
    table = lean_table()
    for name in ("", "MB", "saved", "zeros", "KL per token", "KL per 1 % of bytes"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for record in by_damage_per_byte(info["summary"]):
        size = record["size"]
        per = size["kl_per_percent"]
        table.add_row(
            Text(printable(record["compressed"])),
            f"{size['bytes'] / 1e6:.1f}",
            "nothing" if per is None else f"{100 * size['saved']:.1f} %",
            f"{100 * size['zeros']:.1f} %",
            f"{record['kl']['mean']:.4g}",
            "" if per is None else f"{per:.2g}",
        )
    return table


def answer_tables(info: dict[str, Any], width: int) -> list[Table]:
    """One column per compressed model, one row per question; as many tables as the width asks for."""
    summary = info["summary"]
    each = max(1, (width - FIRST_COLUMN) // NEXT_COLUMN)
    tables = []
    for start in range(0, len(summary), each):
        table = lean_table()
        table.add_column("", overflow="fold", max_width=FIRST_COLUMN)
        for record in summary[start : start + each]:
            table.add_column(Text(printable(record["compressed"]), overflow="fold"), justify="right", overflow="fold")
        for name, show in ROWS:
            cells = [Text(show(record).replace(" [", "\n[")) for record in summary[start : start + each]]
            table.add_row(name, *cells)
        tables.append(table)
    return tables


FIRST_COLUMN, NEXT_COLUMN = 30, 16
"""Characters of the columns."""
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


def _excess(record: dict[str, Any]) -> str:
    found = record["excess_nll"]
    return f"{found['mean']:.4f} [{found['low']:.4f}, {found['high']:.4f}]"


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
    ("excess NLL under dense (nats/token)", _excess),
    ("draft speed-up, predicted / measured", _drafted),
]


def _noise(info: dict[str, Any]) -> list[str]:
    """How much arithmetic alone changes the dense model (N1)."""
    found, where = [], sampled_at(info)
    for against, spread in info["noise"].items():
        kl, tv = spread["kl_dense_compressed"], spread["tv"]
        if kl is None or tv is None:
            continue
        size = (
            f"KL {kl['mean']:.2g} nats in the mean, at most {kl['max']:.2g}; TV at most {tv['max']:.2g}"
            if tv["max"]
            else "0, bit-equal"
        )
        found.append(f"noise floor, dense against itself{where}, another {_changed(against)}: {size}")
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
    table = lean_table()
    for name in ("sublayer", "KL alone, nats", "KL with all others", "cosine", "compressed"):
        table.add_column(name, justify="left" if name == "sublayer" else "right", overflow="fold")
    for part in shown:
        table.add_row(*(_attributed(part) if part else ["…"] * 5))
    return table


def _attribution_notes(found: dict[str, Any]) -> str:
    notes = [f"KL of all together {found['kl_all']:.4f}, sum of the compressed alone {found['sum_alone']:.4f}"]
    for kind, correlation in found["rank_correlation"].items():
        if correlation["rho"] is not None:
            notes.append(
                f"{kind}: rank correlation of 1 - cosine with the damage {correlation['rho']:.2f} "
                f"({correlation['n']} sublayers)"
            )
    return "; ".join(notes)


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
