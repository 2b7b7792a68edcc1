"""What the traces cost over their floor, as ratios within one run.

The floor is what no comparison of two models can avoid: both bare teacher-forced forwards and both head
products over the same tokens, in the same batches. A second model has to be run whole; a recipe on the dense
model's own weights only from its first changed layer on.

    python benchmarks/cost.py [MODEL] [--steps 64] [--prompts 16] [--repeats 5]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from prunelens.metrics import head
from prunelens.metrics.head import Pair, stream_pairs
from prunelens.models.anatomy.hooks import decoder_of, run_decoder
from prunelens.models.batches import pad_right, plan_batches
from prunelens.models.model import Model
from prunelens.models.opening.loading import load
from prunelens.models.surgery.drop import Drop, dropped
from prunelens.tasks.encoding import encode
from prunelens.tasks.prompts import prompts
from prunelens.tracing.forced import BATCH_TOKENS, Trajectory, forced_states

DROP = Drop(attention=frozenset([25, 26]))


def make_trajectories(model: Model, num_prompts: int, steps: int) -> list[Trajectory]:
    """Real prompts with random continuations: which tokens they are does not change the cost."""
    generator = torch.Generator().manual_seed(0)
    asked = encode(prompts(limit=num_prompts), model, chat_template=True, max_new_tokens=steps)
    return [
        Trajectory(
            index,
            "greedy",
            prompt.token_ids,
            tuple(torch.randint(0, model.anatomy.vocab_size, (steps,), generator=generator).tolist()),
            False,
        )
        for index, prompt in enumerate(asked)
    ]


def floor(model: Model, trajectories: list[Trajectory], drop: Drop) -> None:
    """Two whole forwards and two head products, nothing else."""
    states = []
    with torch.inference_mode():
        lengths = [len(trajectory.read_ids) for trajectory in trajectories]
        for batch in plan_batches(lengths, BATCH_TOKENS):
            ids, _ = pad_right([trajectories[index].read_ids for index in batch], model.device)
            run_decoder(decoder_of(model.network), ids)
            with dropped(model.anatomy, drop):
                found = run_decoder(decoder_of(model.network), ids)
            states += [
                found[row, len(trajectories[index].prompt_ids) - 1 : len(trajectories[index].read_ids)]
                for row, index in enumerate(batch)
            ]
        together = torch.cat(states)
        linear = model.network.get_output_embeddings()
        for chunk in together.split(max(1, head.CPU_LOGITS_PER_CHUNK // model.anatomy.vocab_size)):
            linear(chunk)
            linear(chunk)


def second_model(model: Model, trajectories: list[Trajectory]) -> None:
    """The trace of a model with weights of its own (the same object stands for it)."""
    dense, compressed = forced_states(model, trajectories)[0], forced_states(model, trajectories)[0]
    compare(model, trajectories, dense, compressed)


def recipe(model: Model, trajectories: list[Trajectory]) -> None:
    """The trace of drop-attention@25,26."""
    dense, compressed = forced_states(model, trajectories, [DROP])
    compare(model, trajectories, dense, compressed)


def compare(model: Model, trajectories: list[Trajectory], dense: torch.Tensor, compressed: torch.Tensor) -> None:
    tokens = torch.tensor([token for trajectory in trajectories for token in trajectory.token_ids])
    with torch.inference_mode():
        stream_pairs(dense, model.head, [Pair(compressed, model.head)], tokens, 1.0)


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = load(options.model)
    trajectories = make_trajectories(model, options.prompts, options.steps)
    read = sum(len(trajectory.read_ids) for trajectory in trajectories)
    rows = sum(len(trajectory.token_ids) for trajectory in trajectories)
    print(f"{model.name}: {len(trajectories)} texts, {read} tokens read, {rows} steps compared, {model.dtype}")
    floor(model, trajectories, Drop())
    cases = {
        "a second model": (Drop(), second_model),
        "drop-attention@25,26": (DROP, recipe),
    }
    for name, (drop, trace) in cases.items():
        ratios = []
        for _ in range(options.repeats):
            base = seconds(lambda drop=drop: floor(model, trajectories, drop))
            ours = seconds(lambda trace=trace: trace(model, trajectories))
            ratios.append(ours / base)
        print(f"{name}: {statistics.median(ratios):.2f} of the floor (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
