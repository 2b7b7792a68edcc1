"""What the terminal shows of a checkpoint that was pruned and saved."""

from rich.table import Table
from rich.text import Text

from prunelens.errors import printable
from prunelens.report.terminal.screen import closing, console, lean_table
from prunelens.study.prune.prune import PruneResult


def print_pruned(result: PruneResult, seconds: float | None = None, following: str = "") -> None:
    """Print before and after, where the checkpoint lies, then what a reader should know."""
    screen = console()
    screen.print(Text(f"{printable(result.recipe)}\n", style="bold"), pruned_table(result), sep="\n")
    screen.print(Text(f"\nThe checkpoint: {printable(str(result.folder))}"), soft_wrap=True)
    closing(screen, None, [*result.notes, *_remarks(result)], seconds, following)


def pruned_table(result: PruneResult) -> Table:
    """Parameters, bytes and zeros, before and after."""
    table = lean_table()
    for name in ("", "before", "after", "saved"):
        table.add_column(name, justify="right" if name else "left")
    for name, before, after in (
        ("parameters", result.dense_parameters, result.parameters),
        ("bytes of weights on disk", result.dense_bytes, result.num_bytes),
    ):
        table.add_row(name, f"{before:,}", f"{after:,}", f"{100 * (1 - after / before):.2f} %")
    table.add_row("zeros in the blocks' matrices", *(f"{100 * share:.3f} %" for share in _shares(result)), "")
    return table


def _shares(result: PruneResult) -> tuple[float, float]:
    return result.dense_sparsity, result.sparsity


def _remarks(result: PruneResult) -> list[str]:
    found = [f"Opened again with plain transformers: largest difference of a logit {result.max_difference:.3g}."]
    if result.sparsity - result.dense_sparsity > 0.01:
        found.append(
            "The zeros of a mask are stored and multiplied like other numbers: by themselves they save neither disk, "
            "memory nor time. That takes a sparse format or kernel."
        )
    if 1 - result.parameters / result.dense_parameters > 1 - result.num_bytes / result.dense_bytes + 0.001:
        found.append(
            "Dropped sublayers are saved as zeros, so that the checkpoint opens anywhere; prunelens removes them "
            "on opening, and only then they save time and memory."
        )
    return found
