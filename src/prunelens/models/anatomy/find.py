"""Where blocks, sublayers, norms and head of a decoder are: found by structure, proved on load.

A sublayer is what adds to the residual stream. One short forward pass is watched: inside a block the child
modules form chains (norm → attention, norm → MLP, attention → norm, …) in which each reads what the one
before wrote, and the ends of the chains are added to the residual stream. Nothing is taken from names, and
nothing is believed before the stream, the logits and causality have been checked on real numbers.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from prunelens.errors import PrunelensError
from prunelens.models.anatomy.blocks import find_block, with_scales, with_states
from prunelens.models.anatomy.hooks import decoder_of, head_of, returned_by, run_decoder
from prunelens.models.anatomy.manner import Manner, prove_manner
from prunelens.models.anatomy.parts import Block, Kind, Sublayer
from prunelens.models.anatomy.positions import longest_alike, longest_text, watched_positions
from prunelens.models.anatomy.probe import Seen, probe_ids, same, watch, watched_states
from prunelens.models.anatomy.proofs import UnprovedError, check_causality, check_head, check_replay, expect_close
from prunelens.models.batches import Batching
from prunelens.models.placement import is_out_of_memory


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal decoder, as found and proved on load.

    Attributes:
        decoder, final_norm, head: names of modules.
        manner: how it is run so that a text's numbers are its own.
    """

    decoder: str
    blocks: tuple[Block, ...]
    final_norm: str | None
    head: str
    hidden_size: int
    vocab_size: int
    manner: Manner

    @property
    def batching(self) -> Batching:
        """Which rows may share a batch."""
        return self.manner.batching

    def sublayers(self, kind: Kind) -> list[Sublayer]:
        """All sublayers of one kind, in order of depth."""
        found = (block.find(kind) for block in self.blocks)
        return [part for part in found if part is not None]


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a Hugging Face causal decoder and prove the finding on a short input.

    Raises:
        PrunelensError: not a causal decoder, or a part that does not rebuild; the class and the part are named.
    """
    config = getattr(model, "config", None)
    family = f"{type(model).__name__} (family {getattr(config, 'model_type', 'unknown')})"
    try:
        _check_kind(model, config)
        with torch.inference_mode():
            return _find_anatomy(model)
    except UnprovedError as fault:
        raise PrunelensError(
            f"{family}: {fault}; this is not supported, so compare causal language models of another family, "
            "or add this one (CONTRIBUTING.md says how)"
        ) from None
    except Exception as fault:  # a family's own code may raise anything
        if is_out_of_memory(fault):
            raise
        raise PrunelensError(
            f"{family}: expected to read a short text in {model.dtype}, found {_one_line(fault)}; {_advice(fault)}"
        ) from fault


def _check_kind(model: nn.Module, config: Any) -> None:
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise UnprovedError("expected a transformers model, found a module without a configuration")
    if config.is_encoder_decoder:
        raise UnprovedError("expected a causal decoder, found an encoder with a decoder")
    if not hasattr(model, "generate"):
        raise UnprovedError("expected a model that writes text, found one without a language-model head")


def _one_line(fault: Exception) -> str:
    text = " ".join(str(fault).split())
    return f"{type(fault).__name__}{': ' if text else ''}{text[:200]}"


def _advice(fault: Exception) -> str:
    """What may help: another dtype only where the fault speaks of one."""
    if re.search(r"dtype|scalar type|\b(Half|Double|B?Float\w*)\b", str(fault)):
        return "try another dtype"
    return (
        "its configuration or code does not run as a causal language model by itself, so open it as another class or "
        "compare models of another family"
    )


def _find_anatomy(model: nn.Module) -> Anatomy:
    decoder = decoder_of(model)
    names = {module: name for name, module in model.named_modules()}
    ids = probe_ids(model)
    with watched_positions(decoder) as placings:
        check_causality(model, ids, run_decoder(decoder, ids))
    layers = _find_layers(decoder, names)
    watched = [child for layer in layers for child in layer.children()]
    seen, hidden = watch(decoder, [*layers, *watched, *decoder.children()], ids)
    blocks = with_scales([find_block(idx, layer, seen, names) for idx, layer in enumerate(layers)])
    _check_stream(seen, layers, names)
    final_norm = _find_final_norm(seen, layers[-1], decoder, hidden, names)
    logits = check_head(model, head_of(model), ids, hidden)
    check_replay(model, layers, [seen[layer].call.output for layer in layers], ids, hidden)
    context_length = longest_text(model.config)
    with watched_states(module for module, one in seen.items() if returned_by(one.call).num_outputs > 1) as states:
        manner = prove_manner(model, ids, longest_alike(placings, context_length), context_length)
    output = model.get_output_embeddings()  # type: ignore[operator]
    return Anatomy(
        decoder=names[decoder],
        blocks=with_states(blocks, states),
        final_norm=final_norm,
        head=names.get(output, "") if output is not None else "",
        hidden_size=hidden.shape[-1],
        vocab_size=logits.shape[-1],
        manner=manner,
    )


def _find_layers(decoder: nn.Module, names: dict[nn.Module, str]) -> list[nn.Module]:
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    expected = getattr(decoder.config, "num_hidden_layers", None)
    matching = [layers for layers in lists if len(layers) == expected] or lists
    if len(matching) != 1 or len(matching[0]) == 0:
        raise UnprovedError(
            f"expected one list of {expected} decoder layers in {type(decoder).__name__} "
            f"({names[decoder] or 'the model'}), found {[len(layers) for layers in lists] or 'none'}"
        )
    return list(matching[0])


def _check_stream(seen: dict[nn.Module, Seen], layers: list[nn.Module], names: dict[nn.Module, str]) -> None:
    for before, after in pairwise(layers):
        if not torch.equal(seen[before].value, seen[after].source):
            raise UnprovedError(f"expected {names[after]} to read what {names[before]} returns, found other numbers")


def _find_final_norm(
    seen: dict[nn.Module, Seen], last: nn.Module, decoder: nn.Module, hidden: Tensor, names: dict[nn.Module, str]
) -> str | None:
    stream = seen[last]
    for child in decoder.children():
        one = seen.get(child)
        if one is not None and same(one.source, stream.result) and child is not last:
            expect_close(one.value, hidden, f"final norm {names[child]}")
            return names[child]
    expect_close(stream.value, hidden, "state that enters the head (no final norm was found)")
    return None
