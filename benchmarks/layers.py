"""What the traces inside the models cost, as ratios within one run.

L1: every sublayer dropped on its own input, all steps read through the lens, over its floor: one dense forward and
two head products for every sublayer; and the same for a model in which every sublayer has other weights.
D1: a sweep that compresses every sublayer alone, over the same runs each made whole; the forwards by themselves, and
with the head products of both sides.

    python benchmarks/layers.py [MODEL] [--steps 128] [--repeats 3]
"""

import argparse
import copy
import statistics
from functools import partial

import torch

from cost import make_trajectories, seconds
from prunelens.metrics import head
from prunelens.metrics.head import Pair, stream_divergences
from prunelens.models.anatomy.hooks import decoder_of, run_decoder
from prunelens.models.batches import pad_right
from prunelens.models.model import Model
from prunelens.models.opening.loading import load, wrap
from prunelens.models.surgery.drop import Drop, dropped
from prunelens.models.surgery.variant import Variant
from prunelens.tracing.attribution import Attribution
from prunelens.tracing.forced import Trajectory, forced_states, run_edits
from prunelens.tracing.layer_states import Places, read_layers
from prunelens.tracing.layers import trace_layers
from prunelens.tracing.lens import LensReader


def every_sublayer(model: Model) -> list[Drop]:
    """Each sublayer dropped alone."""
    return [
        Drop(**{part.kind: frozenset([block.layer_idx])}) for block in model.anatomy.blocks for part in block.sublayers
    ]


def lens_floor(model: Model, texts: list[Trajectory]) -> None:
    """One dense forward and two head products a sublayer."""
    with torch.inference_mode():
        states = forced_states(model, texts)[0]
        linear = model.network.get_output_embeddings()
        for _ in range(2 * len(every_sublayer(model))):
            for chunk in states.split(head.rows_per_chunk(model.anatomy.vocab_size, model.device)):
                linear(chunk)


def local(model: Model, texts: list[Trajectory], steps: int) -> None:
    """L1 of every sublayer; the last MLP stands for a compressed model, so that L2 has next to nothing to do."""
    last = Variant(model, Drop(mlp=frozenset([len(model.anatomy.blocks) - 1])))
    list(trace_layers(model, {"last": last}, texts, ("normed",), range(1, steps + 1)))


def local_changed(model: Model, other: Model, texts: list[Trajectory], steps: int) -> None:
    """L1 of a model with weights of its own; its streams in depth (L2) are made and left unread."""
    with torch.inference_mode():
        variants = {"other": Variant(other)}
        places = Places(texts, range(len(texts)), set(range(1, steps + 1)))
        ids, _ = pad_right([text.read_ids for text in texts], model.device)
        states = read_layers(model, variants, ids, places)
        states.compressed_depth = {}
        LensReader(model, variants, "normed", 1.0).read(states, places)


def changed_everywhere(model: Model) -> Model:
    """A copy in which every matrix inside the blocks is a little larger."""
    network = copy.deepcopy(model.network)
    for block in model.anatomy.blocks:
        for weight in network.get_submodule(block.name).parameters():
            weight.data *= 1.01 if weight.ndim > 1 else 1.0
    return wrap(network, name="changed")


def passes(model: Model, texts: list[Trajectory], shared: bool) -> None:
    """The forwards of the sweep alone, whole or from the first changed layer on."""
    with torch.inference_mode():
        ids, _ = pad_right([text.read_ids for text in texts], model.device)
        if shared:
            edits = [(drop.first_layer or 0, partial(dropped, model.anatomy, drop)) for drop in every_sublayer(model)]
            for _ in run_edits(model, ids, edits):
                pass
            return
        for drop in every_sublayer(model):
            with dropped(model.anatomy, drop):
                run_decoder(decoder_of(model.network), ids)


def naive_sweep(model: Model, texts: list[Trajectory]) -> None:
    """Every sublayer alone and all but it, each whole, with its divergences at the head."""
    dense = forced_states(model, texts)[0]
    with torch.inference_mode():
        ids, _ = pad_right([text.read_ids for text in texts], model.device)
        for drop in every_sublayer(model):
            with dropped(model.anatomy, drop):
                found = run_decoder(decoder_of(model.network), ids)
            states = torch.cat(
                [found[row, len(text.prompt_ids) - 1 : len(text.read_ids)] for row, text in enumerate(texts)]
            )
            stream_divergences(dense, model.head, [Pair(states, model.head)], 1.0)


def sweep(model: Model, texts: list[Trajectory]) -> None:
    """The same as one attribution: both last sublayers dropped, so that all of both kinds are dropped alone."""
    last = frozenset([len(model.anatomy.blocks) - 1])
    Attribution(model, {"last": Variant(model, Drop(attention=last, mlp=last))}).run(texts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = load(options.model)
    one = make_trajectories(model, 1, options.steps)
    several = make_trajectories(model, 4, 48)
    print(f"{model.name}: {len(every_sublayer(model))} sublayers, {options.steps} steps, {model.dtype}")
    cases = {
        "L1 over its floor": (partial(lens_floor, model, one), partial(local, model, one, options.steps)),
        "L1 of changed weights over its floor": (
            partial(lens_floor, model, one),
            partial(local_changed, model, changed_everywhere(model), one, options.steps),
        ),
        "D1, passes shared over whole": (partial(passes, model, several, False), partial(passes, model, several, True)),
        "D1 with its head products, shared over whole": (
            partial(naive_sweep, model, several),
            partial(sweep, model, several),
        ),
    }
    for name, (base, ours) in cases.items():
        base()
        ratios = [1 / (seconds(base) / seconds(ours)) for _ in range(options.repeats)]
        print(f"{name}: {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})", flush=True)


if __name__ == "__main__":
    main()
