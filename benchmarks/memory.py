"""How much the peak memory of the traces grows when there are eight times as many steps.

Each measurement runs in a process of its own and reports the peak resident memory above what it held with
the model loaded. `texts` adds steps by more texts of 64 tokens; `one text` by one longer text. A naive
comparison would keep T×V logits of both models: 4096 × 49152 × 4 bytes × 2 = 1.6 GB for SmolLM2.

    python benchmarks/memory.py [MODEL]
"""

import argparse
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

STEPS = (512, 4096)
TEXT_LENGTH = 64


def resident() -> float:
    """Megabytes held now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Peak:
    """Samples the resident memory while the body runs."""

    def __enter__(self) -> "Peak":
        self.value, self._stop = resident(), False
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop:
            self.value = max(self.value, resident())
            time.sleep(0.001)

    def __exit__(self, *error: object) -> None:
        self._stop = True
        self._thread.join()


def measure(name: str, kind: str, steps: int) -> None:
    """Print the peak above the loaded model of one trace (child process)."""
    import torch

    from prunelens.metrics.head import Pair, stream_pairs
    from prunelens.models.opening.loading import load
    from prunelens.models.surgery.drop import Drop
    from prunelens.tracing.forced import Trajectory, forced_states

    model = load(name)
    length = steps if kind == "one text" else TEXT_LENGTH
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.anatomy.vocab_size
    texts = [
        tuple(torch.randint(0, vocab_size, (length,), generator=generator).tolist()) for _ in range(steps // length)
    ]
    trajectories = [Trajectory(index, "greedy", (1, 5, 9), text, False) for index, text in enumerate(texts)]
    tokens = torch.tensor([token for text in texts for token in text])
    layers = len(model.layers)
    with torch.inference_mode():
        model.head(forced_states(model, [Trajectory(0, "greedy", (1,), (5, 6), False)])[0])  # first-use buffers
        before = resident()
        with Peak() as peak:
            drop = Drop(attention=frozenset([layers - 5, layers - 4]))
            states, own = forced_states(model, trajectories, [drop])
            stream_pairs(states, model.head, [Pair(own, model.head)], tokens, 1.0)
    print(peak.value - before)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        measure(options.model, options.child[0], int(options.child[1]))
        return
    for kind in ("texts", "one text"):
        peaks = []
        for steps in STEPS:
            command = [sys.executable, __file__, options.model, "--child", kind, str(steps)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks.append(float(answer.split()[-1]))
        growth = peaks[1] - peaks[0]
        print(
            f"{kind}: peak above the weights {peaks[0]:.0f} MB at {STEPS[0]} steps, {peaks[1]:.0f} MB at "
            f"{STEPS[1]}, growth {growth:.0f} MB"
        )


if __name__ == "__main__":
    main()
