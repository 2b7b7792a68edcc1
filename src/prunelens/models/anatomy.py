"""Where blocks, sublayers, norms and head of a decoder are: found by structure, proved on load.

A sublayer is what adds to the residual stream. One short forward pass is watched: inside a block the child
modules form chains (norm → attention, norm → MLP, attention → norm, …) in which each reads what the one
before wrote, and the ends of the chains are added to the residual stream. Nothing is taken from names, and
nothing is believed before the stream, the logits and causality have been checked on real numbers.
"""

import math
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunelens.errors import PrunelensError
from prunelens.models.batches import Batching
from prunelens.models.manner import Manner, prove_manner
from prunelens.models.placement import is_out_of_memory
from prunelens.models.positions import longest_alike, watched_positions
from prunelens.models.probe import Chain, Seen, find_chains, probe_ids, same, watch, watched_states
from prunelens.models.proofs import (
    UnprovedError,
    check_causality,
    check_head,
    check_replay,
    expect_close,
    is_position_wise,
    keeps_zeros,
    solve_scales,
)
from prunelens.models.taps import Returned, decoder_of, head_of, returned_by, run_decoder

Kind = Literal["attention", "mlp"]
KINDS = (["attention", "mlp"], ["mlp", "attention"], ["attention"], ["mlp"])


@dataclass(frozen=True)
class Link:
    """A module of a chain, the last dimension of its hidden states, and what else it returns."""

    module: nn.Module
    width: int
    returned: Returned


@dataclass(frozen=True)
class Sublayer:
    """What adds its output, times `scale`, to the residual stream of block `layer_idx`.

    Attributes:
        kind: `attention` mixes positions (attention, convolution, state space), `mlp` does not.
        layer_idx: index of its block.
        name: of the modules in `body`.
        module: drops the sublayer by returning zeros, or the residual where it adds that inside.
        norms: names of the norms that serve only this sublayer.
        links: from the module that reads the stream to the one whose output is added (norm, module, norm).
        body: the modules that compute with matrices: one, or the two layers of an MLP that is no module.
        scale: what its output is multiplied by.
        residual_at: the argument, by position or name, in which the last module is given the stream it adds inside.
    """

    kind: Kind
    layer_idx: int
    name: str
    module: nn.Module
    norms: tuple[str, ...]
    links: tuple[Link, ...]
    body: tuple[nn.Module, ...]
    scale: float
    residual_at: int | str | None = None

    @property
    def chain(self) -> tuple[nn.Module, ...]:
        """The modules of `links`."""
        return tuple(link.module for link in self.links)

    @property
    def adds_residual(self) -> bool:
        """Whether the output of the chain holds the stream already."""
        return self.residual_at is not None

    def add_to(self, stream: Tensor, output: Tensor) -> Tensor:
        """The stream after this sublayer: what it read, and what the end of its chain returned, together."""
        return output if self.adds_residual else stream + self.scale * output


@dataclass(frozen=True)
class Block:
    """A decoder layer: reads the residual stream and returns it with its sublayers' outputs added."""

    layer_idx: int
    name: str
    module: nn.Module
    layout: Literal["sequential", "parallel"]
    sublayers: tuple[Sublayer, ...]
    returned: Returned

    def find(self, kind: Kind) -> Sublayer | None:
        """The sublayer of this kind, if the block has one."""
        return next((part for part in self.sublayers if part.kind == kind), None)


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
    blocks = _with_scales([_find_block(idx, layer, seen, names) for idx, layer in enumerate(layers)])
    _check_stream(seen, layers, names)
    final_norm = _find_final_norm(seen, layers[-1], decoder, hidden, names)
    logits = check_head(model, head_of(model), ids, hidden)
    check_replay(model, layers, [seen[layer].call.output for layer in layers], ids, hidden)
    context_length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    with watched_states(module for module, one in seen.items() if returned_by(one.call).num_outputs > 1) as states:
        manner = prove_manner(model, ids, longest_alike(placings, context_length), context_length)
    output = model.get_output_embeddings()  # type: ignore[operator]
    return Anatomy(
        decoder=names[decoder],
        blocks=_with_states(blocks, states),
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


def _find_block(layer_idx: int, layer: nn.Module, seen: dict[nn.Module, Seen], names: dict[nn.Module, str]) -> Block:
    name = names[layer]
    if layer not in seen:
        raise UnprovedError(
            f"expected decoder layer {name} to be given hidden states and to return them, found that it is not"
        )
    whole = seen[layer]
    children = set(layer.children())
    chains = find_chains([one for module, one in seen.items() if module in children])
    source = whole.source.to(whole.value.device)  # the layer before may be on another device
    scales = solve_scales(source, whole.value, [chain.contribution for chain in chains], name)
    found = tuple(
        _describe(layer_idx, chain, chains, scale, names) for chain, scale in zip(chains, scales, strict=True)
    )
    kinds = [part.kind for part in found]
    if kinds not in KINDS:
        raise UnprovedError(
            f"expected at most one attention and one MLP in {name}, "
            f"found {', '.join(f'{part.kind} {part.name}' for part in found)}"
        )
    parallel = len(chains) == 2 and same(chains[0].source, chains[1].source)
    _check_middle(source, chains, scales, parallel, name)
    return Block(layer_idx, name, layer, "parallel" if parallel else "sequential", found, returned_by(whole.call))


def _with_scales(blocks: list[Block]) -> tuple[Block, ...]:
    """With the factor that other blocks know for a sublayer whose own zeros tell none."""
    known = [part for block in blocks for part in block.sublayers if not math.isnan(part.scale)]

    def settled(part: Sublayer) -> Sublayer:
        same = [one.scale for one in known if one.kind == part.kind] or [one.scale for one in known]
        return replace(part, scale=same[0] if same else 1.0) if math.isnan(part.scale) else part

    return tuple(replace(block, sublayers=tuple(map(settled, block.sublayers))) for block in blocks)


def _with_states(blocks: tuple[Block, ...], states: dict[nn.Module, Returned]) -> tuple[Block, ...]:
    """With the states that modules carry from token to token, which show only where a text is written."""

    def settled(holder: Any) -> Any:
        return replace(holder, returned=states.get(holder.module, holder.returned))

    def part_settled(part: Sublayer) -> Sublayer:
        return replace(part, links=tuple(map(settled, part.links)))

    return tuple(replace(settled(block), sublayers=tuple(map(part_settled, block.sublayers))) for block in blocks)


def _check_middle(source: Tensor, chains: list[Chain], scales: list[float], parallel: bool, name: str) -> None:
    """Each chain reads the stream as the ones before left it, and knows no other factor than 1 if it adds inside."""
    stream = source
    for chain, scale in zip(chains, scales, strict=True):
        expect_close(chain.source.reshape(stream.shape), stream, f"residual stream inside {name}")
        if chain.residual_at is not None and (parallel or not (scale == 1 or math.isnan(scale))):
            raise UnprovedError(f"expected {name} to use a stream that its parts return, found that it changes it")
        if not parallel and not math.isnan(scale):
            stream = stream + scale * chain.contribution.reshape(stream.shape)


def _describe(layer_idx: int, chain: Chain, chains: list[Chain], scale: float, names: dict[nn.Module, str]) -> Sublayer:
    shared = [link for other in chains if other is not chain for link in other.links]
    links = chain.links
    heavy = [link for link in links if link.has_matrices and link not in shared] or [links[-1]]
    first, last = links.index(heavy[0]), links.index(heavy[-1])
    norms = [link for link in (*links[:first], *links[last + 1 :]) if link not in shared]
    return Sublayer(
        kind="mlp" if all(_is_position_wise(link, chain) for link in heavy) else "attention",
        layer_idx=layer_idx,
        name="+".join([names[heavy[0].module], *(names[link.module].rsplit(".", 1)[-1] for link in heavy[1:])]),
        module=_dropping_module(chain, max(heavy, key=lambda link: link.num_parameters)),
        norms=tuple(names[link.module] for link in norms),
        links=tuple(Link(link.module, link.value.shape[-1], returned_by(link.call)) for link in links),
        body=tuple(link.module for link in heavy),
        scale=scale,
        residual_at=chain.residual_at,
    )


def _dropping_module(chain: Chain, core: Seen) -> nn.Module:
    """The core, if what follows makes zeros of its zeros, else the end of the chain."""
    tail = chain.links[chain.links.index(core) + 1 :]
    if chain.residual_at is None and core.value.numel() == chain.source.numel():
        zeros = torch.zeros_like(core.value)
        if keeps_zeros([(link.module, link.call) for link in tail], zeros):
            return core.module
    return chain.links[-1].module


def _is_position_wise(link: Seen, chain: Chain) -> bool:
    """An MLP is given hidden states and nothing else; a mixer has a mask, a cache or positions, if only None."""
    others = [place for place in link.call.arguments if place != chain.residual_at or link is not chain.links[-1]]
    return len(others) == 1 and is_position_wise(link.module, link.call)


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
