"""Open a written checkpoint with nothing but transformers and compare what it computes with the model it came from."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.auto_class import auto_class_of

NUM_TOKENS = 32
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of logits on opening, as a share of the largest logit (positions are float32 in any case)."""


def logits_on_reopening(folder: Path, model: Model, finished: bool) -> Tensor:
    """What the checkpoint computes, as `logits_of`, when nothing but transformers opens it.

    Args:
        folder: the checkpoint.
        model: what it was made from.
        finished: whether its weights were made by something else, which may store more than the parameters.

    Raises:
        PrunelensError: it does not open, or tensors are missing or left over.
    """
    place: dict[str, Any] = {"device_map": {"": model.device}} if finished else {}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
        opened: Any = auto_class_of(config, model.trust_remote_code).from_pretrained(
            folder,
            dtype=model.dtype,
            attn_implementation=model.network.config._attn_implementation,
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **place,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises anything when settings and weights do not fit
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _wrong(f"it does not open ({' '.join(str(error).split())[:200]})") from error
    network, found = opened
    wrong = [*found["missing_keys"], *found["mismatched_keys"], *(() if finished else found["unexpected_keys"])]
    if wrong:
        raise _wrong(f"{len(wrong)} tensors are missing, left over or of another shape ({wrong[0]}, …)")
    network = network if finished else network.to(model.device)
    return logits_of(network.eval(), model)


def checked_difference(expected: Tensor, found: Tensor, dtype: torch.dtype, is_exact: bool) -> float:
    """The largest difference of two sets of logits.

    Args:
        expected: logits of the model.
        found: logits of the checkpoint, of the same shape.
        dtype: of the weights.
        is_exact: whether they must be equal within float arithmetic; else they only have to be numbers.

    Raises:
        PrunelensError: they are not.
    """
    difference = (expected - found).abs().max().item()
    if not difference < torch.inf:
        raise _wrong("it computes NaN or infinite logits")
    if is_exact and difference > TOLERANCE[dtype] * expected.abs().max().item():
        raise _wrong(f"its logits differ by up to {difference:.3g} from those of the model without the parts")
    return difference


def _wrong(why: str) -> PrunelensError:
    return PrunelensError(
        f"the checkpoint was written, opened again and removed, because {why}; drop other parts, or report this family"
    )


def _text(model: Model) -> Tensor:
    """A short text of fixed token ids, (1, T)."""
    length = min(NUM_TOKENS, model.context_length or NUM_TOKENS)
    return (torch.arange(1, length + 1, device=model.device) * 7919 % model.anatomy.vocab_size).unsqueeze(0)


@torch.inference_mode()
def logits_of(network: Any, model: Model) -> Tensor:
    """Logits (1, T, V) of a short fixed text that `model` can read, on the CPU in at least single precision."""
    logits = network(input_ids=_text(model), use_cache=False).logits.cpu()
    return logits if logits.dtype == torch.float64 else logits.float()
