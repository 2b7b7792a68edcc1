"""What `inspect` shows: blocks, sublayers, norms and head of a model."""

import re
from typing import Any

from rich.table import Table
from rich.text import Text

from prunelens.errors import printable
from prunelens.models.describe import describe_anatomy
from prunelens.report.terminal.screen import console


def print_anatomy(model: Any) -> None:
    """Print what was detected; runs of equal blocks are one row."""
    found = describe_anatomy(model)
    screen = console()
    facts = _grid(2)
    for name in ("family", "parameters", "hidden_size", "vocab_size", "context_length", "chat_template", "dtype"):
        value = found[name]
        facts.add_row(name.replace("_", " "), f"{value:,}" if type(value) is int else Text(printable(str(value))))
    for name in ("decoder", "final_norm", "head", "fingerprint"):
        facts.add_row(name.replace("_", " "), Text(printable(str(found[name]))))
    screen.print(Text(printable(found["name"]), style="bold"), facts)
    shapes: dict[str, list[dict[str, Any]]] = {}
    for block in found["blocks"]:
        shapes.setdefault(repr(_shape(block)), []).append(block)
    for blocks in shapes.values():
        span = _span([block["layer_idx"] for block in blocks])
        table = _grid(5)
        for part in blocks[0]["sublayers"]:
            norms = ", ".join(map(_leaf, part["norms"])) or "shared"
            name = _pattern(part["name"]).rsplit("{i}.", 1)[-1]
            cells = [f"  {part['kind']}", part["class"], name, f"{part['parameters']:,}", f"norm: {norms}"]
            table.add_row(*[Text(printable(cell)) for cell in cells])
        layout = blocks[0]["layout"] if len(blocks[0]["sublayers"]) > 1 else "one sublayer"
        screen.print(Text(f"{span}, {layout}"), table)
    for note in found["notes"]:
        screen.print(Text(printable(note), style="dim"))
    screen.print("Residual stream, logits, causality and replay were rebuilt from these parts: proved.")


def _grid(columns: int) -> Table:
    """A table without lines; a name that is too long goes on in the next line."""
    grid = Table.grid(padding=(0, 2))
    for _ in range(columns):
        grid.add_column(overflow="fold")
    return grid


def _span(indices: list[int]) -> str:
    """block 3, blocks 0-29, blocks 0-2, 4, 6-8."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"block{'s' if len(indices) > 1 else ''} {', '.join(parts)}"


def _shape(block: dict[str, Any]) -> Any:
    parts = [(part["kind"], _pattern(part["name"]), part["class"], part["parameters"]) for part in block["sublayers"]]
    return block["layout"], parts


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{i}.", name)


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]
