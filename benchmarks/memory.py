"""How much the peak memory of the traces grows when there are eight times as many steps.

Each measurement runs in a process of its own and reports the peak resident memory above what it held with
the model loaded. `texts` adds steps by more texts of 64 tokens; `one text` by one longer text. A naive
comparison would keep T×V logits of both models: 4096 × 49152 × 4 bytes × 2 = 1.6 GB for SmolLM2.

Then what a whole comparison holds at its peak, over the size of one model: three checkpoints of random weights, and one
with three recipes that change weights; beside it the peak of a comparison with a recipe that only drops.

    python benchmarks/memory.py [MODEL] [--comparisons-only]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

STEPS = (512, 4096)
TEXT_LENGTH = 64
RANDOM_LAYERS = 20
"""Of the random models: with the built-in one's shape about 400 MB."""
CHANGING = ("magnitude:0.5", "wanda:0.5", "magnitude:2:4")


def resident() -> float:
    """Megabytes held now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def highest() -> float:
    """Most megabytes held since this program began; `ru_maxrss` would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


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


def write_checkpoints(name: str, folder: Path, number: int) -> list[Path]:
    """Checkpoints with random weights in the shape of a model, but for the number of layers, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from prunelens.models.opening.sources import resolve_name

    source, found = resolve_name(name), []
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers = RANDOM_LAYERS
    for index in range(number):
        torch.manual_seed(index)
        found.append(folder / f"random-{index}")
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(found[-1])
        AutoTokenizer.from_pretrained(source).save_pretrained(found[-1])
    return found


def compare_once(models: list[str]) -> None:
    """Print the peak in MB of one comparison, and that before it (child process)."""
    from prunelens.api import compare
    from prunelens.tasks.prompts import prompts

    before = highest()
    compare(*models, prompts=prompts(limit=2), max_new_tokens=8)
    print(before, highest())


def comparisons(name: str) -> None:
    """What whole comparisons hold at their peak."""
    with tempfile.TemporaryDirectory() as place:
        folders = list(map(str, write_checkpoints(name, Path(place), 3)))
        size = sum(file.stat().st_size for file in Path(folders[0]).glob("*.safetensors")) / 2**20
        dense = folders[0]
        cases = {
            "one dropping recipe": [dense, "drop-attention@3"],
            "three recipes that change weights": [dense, *CHANGING],
            "three checkpoints": folders,
        }
        for what, models in cases.items():
            command = [sys.executable, __file__, name, "--compare", json.dumps(models)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            before, peak = map(float, answer.split()[-2:])
            print(
                f"compare, {what}: peak {peak:.0f} MB, {peak - before:.0f} MB above the imports, "
                f"{(peak - before) / size:.2f} x one model of {size:.0f} MB",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--comparisons-only", action="store_true")
    parser.add_argument("--child", nargs=2)
    parser.add_argument("--compare")
    options = parser.parse_args()
    if options.child:
        measure(options.model, options.child[0], int(options.child[1]))
    elif options.compare:
        compare_once(json.loads(options.compare))
    else:
        if not options.comparisons_only:
            traces(options.model)
        comparisons(options.model)


def traces(name: str) -> None:
    """How the peak of the traces grows with the steps."""
    for kind in ("texts", "one text"):
        peaks = []
        for steps in STEPS:
            command = [sys.executable, __file__, name, "--child", kind, str(steps)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks.append(float(answer.split()[-1]))
        growth = peaks[1] - peaks[0]
        print(
            f"{kind}: peak above the weights {peaks[0]:.0f} MB at {STEPS[0]} steps, {peaks[1]:.0f} MB at "
            f"{STEPS[1]}, growth {growth:.0f} MB"
        )


if __name__ == "__main__":
    main()
