"""L3: every model reads the dense model's own continuation; states of all steps from one pass.

The dense pass records what the layers before each recipe's first change return, and a dropped model runs
from there on, in the same batch, with nothing kept for the next.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from prunelens.models.anatomy.hooks import decoder_of, record_outputs, replay_from, run_decoder
from prunelens.models.batches import pad_right, plan_batches
from prunelens.models.model import Model
from prunelens.models.surgery.drop import Drop, dropped
from prunelens.progress import Advance, unreported

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Trajectory:
    """A prompt with the dense model's continuation.

    Attributes:
        prompt: index of the prompt.
        trace: how the continuation was chosen, `greedy` or `sampled`.
        prompt_ids: the prompt's tokens.
        token_ids: the continuation's tokens; step t predicts token t from the prompt and the tokens before.
        ended: whether it ends with EOS.
    """

    prompt: int
    trace: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    ended: bool

    @property
    def read_ids(self) -> tuple[int, ...]:
        """What a model reads: all but the last token, which is only predicted."""
        return (*self.prompt_ids, *self.token_ids[:-1])


def forced_states(
    model: Model,
    trajectories: Sequence[Trajectory],
    drops: Sequence[Drop] = (),
    batch_tokens: int = BATCH_TOKENS,
    advance: Advance = unreported,
) -> list[Float[Tensor, "T d"]]:
    """States that enter the head at every step of every trajectory, one after the other.

    Args:
        model: the model that reads.
        trajectories: what it reads.
        drops: variants of the model with parts taken out.
        batch_tokens: tokens run at once.
        advance: called with the number of tokens read by the model and all variants.

    Returns:
        The model's own states and then those of each variant, each (T, d) with T the total number of steps.
    """
    starts = _offsets(trajectories)
    device, width = model.device, model.anatomy.hidden_size
    found = [torch.empty(starts[-1], width, dtype=model.dtype, device=device) for _ in range(1 + len(drops))]
    lengths = [len(trajectory.read_ids) for trajectory in trajectories]
    with torch.inference_mode():
        for batch in plan_batches(lengths, batch_tokens, model.anatomy.batching):
            ids, _ = pad_right([trajectories[index].read_ids for index in batch], device)
            for out, states in zip(found, _run_batch(model, ids, drops), strict=True):
                for row, index in enumerate(batch):
                    low = len(trajectories[index].prompt_ids) - 1
                    steps = len(trajectories[index].token_ids)
                    out[starts[index] : starts[index] + steps] = states[row, low : low + steps]
            advance(sum(lengths[index] for index in batch))
    return found


def _offsets(trajectories: Sequence[Trajectory]) -> list[int]:
    starts = [0]
    for trajectory in trajectories:
        starts.append(starts[-1] + len(trajectory.token_ids))
    return starts


def _run_batch(model: Model, ids: Tensor, drops: Sequence[Drop]) -> Iterator[Tensor]:
    """The dense pass, then each variant from its first changed layer on."""
    edits = [(drop.first_layer or 0, partial(dropped, model.anatomy, drop)) for drop in drops]
    return run_edits(model, ids, edits)


Edit = Callable[[], AbstractContextManager[None]]
"""Changes a model while its context is open."""


def run_edits(
    model: Model, ids: Int64[Tensor, "B T"], edits: Sequence[tuple[int, Edit]], base: Edit = nullcontext
) -> Iterator[Float[Tensor, "B T d"]]:
    """States that enter the head for a model and then for each of its edits, one at a time to hold little.

    Args:
        model: the model.
        ids: right-padded token ids.
        edits: the first layer that an edit changes, and the edit.
        base: an edit of the model that all others start from: before their first layer nothing differs from it.
    """
    decoder, layers = decoder_of(model.network), model.layers
    ids = ids.to(model.device)
    wanted = sorted({start - 1 for start, _ in edits if start})
    with base(), record_outputs(layers, wanted) as recorded:
        yield run_decoder(decoder, ids)
    for start, edit in edits:
        with edit(), replay_from(layers, start, recorded[start - 1] if start else None):
            states = run_decoder(decoder, ids)
        yield states
