"""What masks cost over their floor, as ratios within one run: time, and peak memory above the loaded model.

The floor is two plain forwards of the decoder over the calibration tokens, in the same batches: block by block,
each block has to be run once dense and once sparse. Time is measured interleaved with the floor in one process;
memory in a process for each method. The weights that a method makes anew (all matrices of the blocks) are part of
its memory. Goals: wanda at most 1.3, sparsegpt at most 2.5 times the floor's time.

    python benchmarks/pruning.py [MODEL] [--sequences 16] [--length 512] [--repeats 3]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from memory import Peak, resident

METHODS = ("wanda:0.5", "wanda:2:4", "sparsegpt:0.5", "sparsegpt:4:8")


def jobs(name: str, num_sequences: int, length: int) -> dict[str, Callable[[], None]]:
    """The floor and every method, on random tokens."""
    import torch

    from prunelens.models.batches import equal_batches
    from prunelens.models.loading import load
    from prunelens.models.taps import decoder_of, run_decoder
    from prunelens.models.twin import twin_of
    from prunelens.pruning.recipe import parse_recipe
    from prunelens.pruning.sequential import BATCH_TOKENS, mask_weights
    from prunelens.pruning.steps import MaskStep

    torch.set_num_threads(os.cpu_count() or 1)
    model = load(name)
    generator = torch.Generator().manual_seed(0)
    shape = (num_sequences, length)
    sequences = torch.randint(0, model.anatomy.vocab_size, shape, generator=generator).tolist()

    def floor() -> None:
        with torch.no_grad():
            for batch in equal_batches(sequences, BATCH_TOKENS):
                for _ in range(2):
                    run_decoder(decoder_of(model.network), torch.tensor(batch))

    def masker(method: str) -> Callable[[], None]:
        step = parse_recipe(method).steps[0]
        assert isinstance(step, MaskStep)
        return lambda: print(end="" if mask_weights(twin_of(model), step, sequences).zeros else "no zeros")

    return {"floor": floor} | {method: masker(method) for method in METHODS}


def measure_memory(options: argparse.Namespace) -> float:
    """The peak of one job above the loaded model, in MB, in a process of its own."""
    arguments = [options.model, "--sequences", str(options.sequences), "--length", str(options.length)]
    command = [sys.executable, __file__, *arguments, "--job", options.job]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    found = jobs(options.model, options.sequences, options.length)
    if options.job:
        before = resident()
        with Peak() as peak:
            found[options.job]()
        print(peak.value - before)
        return
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(options.repeats):
        for name, job in found.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    memory = {name: measure_memory(argparse.Namespace(**vars(options) | {"job": name})) for name in found}
    print(f"floor, two forwards: {statistics.median(seconds['floor']):.1f} s, memory {memory['floor']:.0f} MB")
    for name in METHODS:
        ratios = [own / floor for own, floor in zip(seconds[name], seconds["floor"], strict=True)]
        print(
            f"{name}: {statistics.median(ratios):.2f} of the floor (from {min(ratios):.2f} to {max(ratios):.2f}), "
            f"memory {memory[name]:.0f} MB, {memory[name] / memory['floor']:.2f} of the floor's"
        )


if __name__ == "__main__":
    main()
