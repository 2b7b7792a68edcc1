"""Run some blocks of a decoder on what the block before them returned; the model's own forward does the rest."""

from typing import Any

from torch import Tensor

from prunelens.models.anatomy.hooks import decoder_of, record_outputs, replay_from, run_decoder
from prunelens.models.model import Model
from prunelens.models.surgery.drop import Drop, dropped


def run_span(model: Model, start: int, stop: int, ids: Tensor, output: Any) -> Any:
    """What block `stop - 1` returns.

    Args:
        model: the model as it runs now.
        start, stop: the blocks that run, `stop` not among them.
        ids: token ids (B, T), right-padded.
        output: what block `start - 1` returned for them; it stays as it is. None where `start` is 0.
    """
    if start == stop:
        return output
    later = Drop(block=frozenset(range(stop, len(model.anatomy.blocks))))
    with (
        dropped(model.anatomy, later),
        replay_from(model.layers, start, _copied(output)),
        record_outputs(model.layers, [stop - 1]) as recorded,
    ):
        run_decoder(decoder_of(model.network), ids)
    return recorded[stop - 1]


def _copied(output: Any) -> Any:
    """With a copy of its tensor, since a block may add to what it is given in place."""
    if isinstance(output, tuple):
        return (output[0].clone(), *output[1:])
    return output.clone() if isinstance(output, Tensor) else output
