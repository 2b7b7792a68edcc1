"""What a written step costs over the model's own cached forward, and what free running saves by starting late.

The floor of a step is the network's forward of one token a row with transformers' own growing cache and nothing
else: fixed tokens, the logits of the last position. A bare step follows each written one, so that whatever slows the
machine down for a while slows both.

    python benchmarks/writing.py [MODEL] [--rows 1 16 64] [--prompt 48] [--steps 16] [--repeats 3] [--prompts 8]
"""

import argparse
import statistics
import time

import torch
from transformers import DynamicCache

from prunelens.metrics.head import Pair, stream_pairs
from prunelens.models.model import Model
from prunelens.models.opening.loading import load
from prunelens.models.surgery.drop import Drop, dropped
from prunelens.pruning.redundancy import rank_redundancy
from prunelens.tasks.encoding import encode
from prunelens.tasks.prompts import prompts
from prunelens.tracing.forced import Trajectory, forced_states
from prunelens.tracing.free import first_other, write_dense, write_free
from prunelens.tracing.generate import Continuation, Greedy, Sampled, uniforms, write

HORIZON = 32


class Floor:
    """The bare network, a step at a time, with tokens that nobody chooses."""

    def __init__(self, model: Model, prompts: list[list[int]]) -> None:
        self._network = model.network
        self._cache = DynamicCache(config=model.network.config.get_text_config(decoder=True))
        self._tokens = torch.tensor([[prompt[-1]] for prompt in prompts], device=model.device)
        self._forward(torch.tensor(prompts, device=model.device))

    def step(self) -> float:
        """Seconds of one step."""
        start = now()
        self._forward(self._tokens)
        return now() - start

    def _forward(self, ids: torch.Tensor) -> None:
        with torch.inference_mode():
            self._network(input_ids=ids, cache=self._cache, use_cache=True, logits_to_keep=1)


def now() -> float:
    """Seconds, when the device has done all that was started."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def step_ratio(model: Model, num_rows: int, length: int, steps: int, sampled: bool, seed: int) -> float:
    """The median over the steps of a text: seconds of a written step over those of the bare one after it."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, model.anatomy.vocab_size, (num_rows, length), generator=generator).tolist()
    floor = Floor(model, rows)
    ratios: list[float] = []
    before = 0.0

    def follow(written: int) -> None:
        nonlocal before
        own = now() - before
        ratios.append(own / floor.step())
        before = now()

    rules = [Sampled(uniforms(seed, "sample", row, 0, steps), 1.0) if sampled else Greedy() for row in rows]
    write(model, rows, rules, steps, num_rows, follow)
    return statistics.median(ratios[1:])  # the first step reads the prompts


def show_steps(model: Model, options: argparse.Namespace) -> None:
    """Print a line for each number of rows and each rule."""
    for num_rows in options.rows:
        for name, sampled in (("greedy", False), ("sampled", True)):
            found = [
                step_ratio(model, num_rows, options.prompt, options.steps, sampled, seed)
                for seed in range(options.repeats)
            ]
            print(f"{num_rows} rows, {name}: a written step takes {spread(found)} of a bare one", flush=True)


def show_free(model: Model, num_prompts: int, repeats: int) -> None:
    """Print what a compressed model's texts take when they are written from the divergence on and from the start."""
    asked = [prompt.token_ids for prompt in encode(prompts(limit=num_prompts), model, True, HORIZON)]
    greedy, _ = write_dense(model, asked, HORIZON, 1.0, 0, 32)
    texts = [
        Trajectory(index, "greedy", prompt, tuple(text.token_ids), text.ended)
        for index, (prompt, text) in enumerate(zip(asked, greedy, strict=True))
    ]
    ranking = rank_redundancy(model, [[*text.prompt_ids, *text.token_ids] for text in texts])
    drop = Drop(attention=frozenset([ranking.ordered("attention")[0][1]]))
    known = divergences(model, drop, texts)
    found = []
    for _ in range(repeats):
        late, from_start = (free_seconds(model, drop, asked, greedy, starts) for starts in (known, [0] * len(asked)))
        found.append(late / from_start)
    print(f"free running, drop-attention:1, {num_prompts} prompts of {HORIZON} tokens, same until token {known}:")
    print(f"written from there on: {spread(found)} of the time of writing from the start")


def divergences(model: Model, drop: Drop, texts: list[Trajectory]) -> list[int]:
    """Steps before the compressed model chooses another token, from what it reads."""
    tokens = torch.tensor([token for text in texts for token in text.token_ids])
    dense, own = forced_states(model, texts, [drop])
    (stats,) = stream_pairs(dense, model.head, [Pair(own, model.head)], tokens, 1.0)
    lengths = [len(text.token_ids) for text in texts]
    pieces = zip(
        texts, stats["top_ids_compressed"][:, 0].split(lengths), stats["same_top1"].split(lengths), strict=True
    )
    return [first_other(text.token_ids, top, same) for text, top, same in pieces]


def free_seconds(
    model: Model, drop: Drop, asked: list[tuple[int, ...]], greedy: list[Continuation], known: list[int]
) -> float:
    """Seconds for the compressed model's texts when so much of them is known."""
    start = now()
    with dropped(model.anatomy, drop):
        write_free(model, asked, greedy, known, HORIZON, 32)
    return now() - start


def spread(values: list[float]) -> str:
    """The median with the least and the greatest."""
    return f"{statistics.median(values):.2f} (from {min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=48)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8)
    options = parser.parse_args()
    model = load(options.model)
    own_ends = model.network.generation_config.eos_token_id
    print(f"{model.name}, {model.dtype}, {model.device}: prompts of {options.prompt} tokens, {options.steps} steps")
    model.network.generation_config.eos_token_id = []  # so that no row ends
    show_steps(model, options)
    model.network.generation_config.eos_token_id = own_ends
    show_free(model, options.prompts, options.repeats)


if __name__ == "__main__":
    main()
