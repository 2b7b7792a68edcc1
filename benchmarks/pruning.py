"""What making the weights sparse costs over its floor: time as ratios within one run, and the peak of memory.

The floor is two plain forwards of the decoder over the calibration tokens, in the same batches: every block has to
be run once dense, for its statistics, and once sparse, for the inputs of the next. Each method has a process of its
own, in which floor and method take turns, with all threads; a ratio is that of two neighbours. Memory is the peak of
what is resident above the loaded model, in MB; the new weights of a method (all matrices of the blocks, kept beside
the dense ones) are part of it. The tokens are random: which they are does not change the cost.

The goal is at most 1.3 times the floor's time for wanda and at most 2.5 times for sparsegpt.

    python benchmarks/pruning.py [MODEL] [--sequences 16] [--length 512] [--repeats 3]
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from memory import Peak, resident

METHODS = ("wanda:0.5", "wanda:2:4", "sparsegpt:0.5", "sparsegpt:4:8")


def measure(options: argparse.Namespace) -> None:
    """Print seconds and peaks in MB of the floor and of one method, as JSON (child process)."""
    import torch

    from prunelens.models.anatomy.hooks import decoder_of, run_decoder
    from prunelens.models.batches import equal_batches
    from prunelens.models.opening.loading import load
    from prunelens.models.surgery.shared_copy import shared_copy_of
    from prunelens.pruning.sequential import BATCH_TOKENS, mask_weights
    from prunelens.pruning.steps.mask import MaskStep

    torch.set_num_threads(os.cpu_count() or 1)
    model = load(options.model, device="cpu")
    method, _, sparsity = options.method.partition(":")
    step = MaskStep(method=method, sparsity=sparsity)
    generator = torch.Generator().manual_seed(0)
    shape = (options.sequences, options.length)
    sequences = torch.randint(0, model.anatomy.vocab_size, shape, generator=generator).tolist()
    decoder = decoder_of(model.network)

    def floor() -> None:
        with torch.no_grad():
            for batch in equal_batches(sequences, BATCH_TOKENS):
                for _ in range(2):
                    run_decoder(decoder, torch.tensor(batch))

    def ours() -> None:
        mask_weights(shared_copy_of(model), method, step.pattern, sequences)

    with torch.no_grad():
        run_decoder(decoder, torch.tensor([sequences[0][:2]]))  # first-use buffers
    ctypes.CDLL(None).malloc_trim(0)  # what loading left behind would hide part of the peaks
    before = resident()
    turns = [(timed(floor, before), timed(ours, before)) for _ in range(options.repeats)]
    print(json.dumps(turns))


def timed(work: Callable[[], None], before: float) -> tuple[float, float]:
    """Seconds, and the peak in MB above `before`."""
    with Peak() as peak:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    return seconds, peak.value - before


def line(method: str, turns: list[list[list[float]]]) -> str:
    """What is said of one method; the memory is that of the first turn, before anything is left behind."""
    ratios = [ours[0] / floor[0] for floor, ours in turns]
    (_, floor_peak), (_, our_peak) = turns[0]
    return (
        f"{method}: {statistics.median(ratios):.2f} of the floor (from {min(ratios):.2f} to {max(ratios):.2f}); "
        f"memory {our_peak:.0f} MB, {our_peak / floor_peak:.1f} of the floor's"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        measure(options)
        return
    texts = f"{options.sequences} texts of {options.length} tokens"
    print(f"{options.model}: {texts}, {os.cpu_count()} threads", flush=True)
    for method in METHODS:
        command = [sys.executable, __file__, *sys.argv[1:], "--method", method]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(line(method, json.loads(answer.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
