"""How much a deviation of the residual stream moves the probabilities: a d × d metric of final norm and head (R4).

By T3, KL(p‖p') ≈ Var_p(Δz)/2 at T = 1, and Var_p(JΔr) = Δrᵀ·E[ggᵀ]·Δr with g = Jᵀ(e_y − p) and y drawn from p. The
final norm divides by the size of the stream, so the mean over tokens is taken of ‖r‖²·ggᵀ, and a token of size ‖r‖
counts by 1/‖r‖².
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.models.anatomy.hooks import decoder_of, record_outputs, run_decoder, run_head
from prunelens.models.batches import pad_right, plan_batches, with_tokens
from prunelens.models.model import Model

NUM_TOKENS = 2048
BATCH_TOKENS = 2048
MOST_LOGITS = 2**24


def head_metric(
    model: Model, sequences: Sequence[Sequence[int]], num_tokens: int = NUM_TOKENS, seed: int = 0
) -> Float64[Tensor, "d d"]:
    """E[‖r‖²·ggᵀ] over tokens of calibration texts, one draw y a token.

    Args:
        model: the dense model.
        sequences: token ids of the calibration texts, of which about `num_tokens` tokens are read.
        num_tokens: how many.
        seed: of the draws.

    Raises:
        PrunelensError: no calibration tokens, or logits that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(model.anatomy.hidden_size, model.anatomy.hidden_size, dtype=torch.float64, device=model.device)
    count = 0
    for streams in _streams(model, _some(sequences, num_tokens)):
        for rows in streams.split(max(1, MOST_LOGITS // model.anatomy.vocab_size)):
            slopes = rows.double().norm(dim=-1, keepdim=True) * _slopes(model, rows, generator).double()
            total += slopes.T @ slopes
            count += len(rows)
    return total / count


def _some(sequences: Sequence[Sequence[int]], num_tokens: int) -> list[Sequence[int]]:
    """Texts spread evenly over all, until they hold so many tokens."""
    sequences = with_tokens(sequences)
    step = max(1, sum(map(len, sequences)) // num_tokens)
    return sequences[::step]


def _streams(model: Model, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """The stream that enters the final norm, (tokens, d) for each batch."""
    last = len(model.layers) - 1
    found = []
    for batch in plan_batches([len(sequence) for sequence in sequences], BATCH_TOKENS, model.anatomy.batching):
        ids, lengths = pad_right([sequences[index] for index in batch], model.device)
        with torch.no_grad(), record_outputs(model.layers, [last]) as recorded:
            run_decoder(decoder_of(model.network), ids)
        output = recorded[last]
        stream = output[0] if isinstance(output, tuple) else output
        real = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
        found.append(stream[real.to(stream.device)].to(model.device))
    return found


def _slopes(model: Model, rows: Tensor, generator: torch.Generator) -> Tensor:
    """g of each row, (rows, d): the gradient of log p(y) for a draw y from p."""
    norm = model.anatomy.final_norm
    with torch.enable_grad():
        streams = rows.detach().clone().requires_grad_(True)
        states = streams if norm is None else model.network.get_submodule(norm)(streams)
        logits = run_head(model.network, states)
        if not torch.isfinite(logits).all():
            raise PrunelensError(
                f"expected finite logits of {model.name} on the calibration texts to weigh a repair, found NaN or "
                "infinity; use float32, or leave out the texts that overflow"
            )
        probs = logits.detach().float().softmax(dim=-1)
        drawn = torch.multinomial(probs.cpu(), 1, generator=generator).to(probs.device)
        upward = torch.zeros_like(probs).scatter_(1, drawn, 1.0) - probs
        (slopes,) = torch.autograd.grad(logits, streams, upward.to(logits.dtype))
    return slopes
