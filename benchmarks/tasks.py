"""What asking tasks costs: each way of sparing work beside the same work without it, in turn in one process.

Seconds are those of this process on the CPU, so that what else the machine does counts little. Run it with
`python benchmarks/tasks.py`; the table goes into docs/benchmarks.md.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from prunelens.models.model import Model
from prunelens.models.opening.loading import load
from prunelens.progress import silent
from prunelens.tasks.harness import Asking, Harness
from prunelens.tasks.identity import identity_of
from prunelens.tasks.kept_answers import KeptAnswers

Run = Callable[[], Any]


def seconds(run: Run) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def compared(before: Run, after: Run, repeats: int) -> tuple[float, float, float, float]:
    """(median before, median after, lowest and highest ratio after / before) of calls in turn."""
    pairs = [(seconds(before), seconds(after)) for _ in range(repeats)]
    ratios = [after / before for before, after in pairs]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    return medians[0], medians[1], min(ratios), max(ratios)


def shared(model: Model, harness: Harness, name: str, limit: int) -> tuple[Run, Run]:
    """What contexts share read again for every continuation, and read once."""
    items = harness.items(name, limit=limit)

    def after() -> None:
        harness.answer(model, name, Asking(items), items)

    def before() -> None:
        with patch("prunelens.tasks.runner.shares_prefixes", lambda model: False):
            after()

    return before, after


def kept(model: Model, harness: Harness, name: str, limit: int, folder: Path) -> tuple[Run, Run]:
    """Dense answers computed, and those of an earlier run, the name of the model included."""
    items = harness.items(name, limit=limit)
    harness.answer(model, name, Asking(items), items, KeptAnswers(folder, str(identity_of(model))))

    def after() -> None:
        harness.answer(model, name, Asking(items), items, KeptAnswers(folder, str(identity_of(model))))

    return lambda: harness.answer(model, name, Asking(items), items), after


def by_the_evaluator(model: Model, harness: Harness, name: str, limit: int) -> tuple[Run, Run]:
    """The harness's own evaluator with a model of its own class, and the same requests here."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    from prunelens.tasks.harness import silenced

    items = harness.items(name, limit=limit)

    def before() -> None:
        with silenced():
            own = HFLM(pretrained=model.network, tokenizer=model.tokenizer, batch_size=40, backend="causal")
            tasks = [described.task for described in harness.tasks[name].values()]
            evaluator.simple_evaluate(
                own, tasks=tasks, samples=items, bootstrap_iters=0, task_manager=harness._manager, log_samples=True
            )

    return before, lambda: harness.run(model, name, silent, limit=limit)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load("smollm2", dtype="float32", device="cpu")
    harness = Harness(("core_choice", "core_letters", "core_facts"))
    print("| | task | before, s | after, s | after / before |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for what, task, make in (
            ("shared starts read once", "core_choice", shared),
            ("shared starts read once", "core_letters", shared),
            ("lm_eval's evaluator, this one", "core_choice", by_the_evaluator),
            ("lm_eval's evaluator, this one", "core_facts", by_the_evaluator),
            ("dense answers kept", "core_choice", lambda *given: kept(*given, Path(folder))),
            ("dense answers kept", "core_facts", lambda *given: kept(*given, Path(folder))),
        ):
            found = compared(*make(model, harness, task, options.limit), options.repeats)
            low, high = found[2:]
            print(f"| {what} | {task} | {found[0]:.2f} | {found[1]:.2f} | {low:.2f}–{high:.2f} |", flush=True)


if __name__ == "__main__":
    main()
