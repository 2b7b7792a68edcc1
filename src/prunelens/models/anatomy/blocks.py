"""The sublayers of one block: chains of modules between the stream it reads and the stream it returns."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunelens.models.anatomy.hooks import Returned, returned_by
from prunelens.models.anatomy.parts import Block, Kind, Link, Sublayer
from prunelens.models.anatomy.probe import Chain, Seen, find_chains, same
from prunelens.models.anatomy.proofs import UnprovedError, expect_close, is_position_wise, keeps_zeros, solve_scales

KINDS = (["attention", "mlp"], ["mlp", "attention"], ["attention"], ["mlp"])


def find_block(layer_idx: int, layer: nn.Module, seen: dict[nn.Module, Seen], names: dict[nn.Module, str]) -> Block:
    """What was seen of one decoder layer, taken apart and put together again.

    Raises:
        UnprovedError: its sublayers do not add up to it, or are not an attention and an MLP.
    """
    name = names[layer]
    if layer not in seen:
        raise UnprovedError(
            f"expected decoder layer {name} to be given hidden states and to return them, found that it is not"
        )
    whole = seen[layer]
    children = set(layer.children())
    chains = find_chains([one for module, one in seen.items() if module in children])
    source = whole.source.to(whole.value.device)  # the layer before may be on another device
    _check_widths(chains, source, names)
    scales = solve_scales(source, whole.value, [chain.contribution for chain in chains], name)
    kinds = [_kind(chain, [other for other in chains if other is not chain]) for chain in chains]
    groups = _grouped(chains, kinds)
    found = tuple(_joined(layer_idx, kinds[group[0]], group, chains, scales, names) for group in groups)
    if [part.kind for part in found] not in KINDS:
        raise UnprovedError(
            f"expected at most one attention and one MLP in {name}, "
            f"found {', '.join(f'{part.kind} {part.name}' for part in found)}"
        )
    parallel = len(groups) == 2 and same(chains[groups[0][0]].source, chains[groups[1][0]].source)
    _check_middle(source, [[(chains[at], scales[at]) for at in group] for group in groups], parallel, name)
    return Block(layer_idx, name, layer, "parallel" if parallel else "sequential", found, returned_by(whole.call))


def _check_widths(chains: list[Chain], source: Tensor, names: dict[nn.Module, str]) -> None:
    """Every end of a chain adds to the stream, so it has the stream's shape."""
    for chain in chains:
        end = chain.links[-1]
        if end.value.numel() != source.numel():
            raise UnprovedError(
                f"expected {names[end.module]} to be read by another module or to add to a residual stream of shape "
                f"{tuple(source.shape)}, found that it returns {tuple(end.value.shape)}"
            )


def with_scales(blocks: list[Block]) -> tuple[Block, ...]:
    """With the factor that other blocks know for a sublayer whose own zeros tell none."""
    strands = [strand for block in blocks for part in block.sublayers for strand in part.strands]
    known = [strand for strand in strands if not math.isnan(strand.scale)]

    def settled(part: Sublayer) -> Sublayer:
        part = replace(part, beside=tuple(map(settled, part.beside)))
        same = [one.scale for one in known if one.kind == part.kind] or [one.scale for one in known]
        return replace(part, scale=same[0] if same else 1.0) if math.isnan(part.scale) else part

    return tuple(replace(block, sublayers=tuple(map(settled, block.sublayers))) for block in blocks)


def with_states(blocks: tuple[Block, ...], states: dict[nn.Module, Returned]) -> tuple[Block, ...]:
    """With the states that modules carry from token to token, which show only where a text is written."""

    def settled(holder: Any) -> Any:
        return replace(holder, returned=states.get(holder.module, holder.returned))

    def part_settled(part: Sublayer) -> Sublayer:
        beside = tuple(map(part_settled, part.beside))
        return replace(part, links=tuple(map(settled, part.links)), beside=beside)

    return tuple(replace(settled(block), sublayers=tuple(map(part_settled, block.sublayers))) for block in blocks)


def _check_middle(source: Tensor, groups: list[list[tuple[Chain, float]]], parallel: bool, name: str) -> None:
    """Each chain reads the stream as the ones before left it, and knows no other factor than 1 if it adds inside."""
    stream = source
    for group in groups:
        for chain, scale in group:
            expect_close(chain.source.reshape(stream.shape), stream, f"residual stream inside {name}")
            alone = not parallel and len(group) == 1
            if chain.residual_at is not None and not (alone and (scale == 1 or math.isnan(scale))):
                raise UnprovedError(f"expected {name} to use a stream that its parts return, found that it changes it")
        if not parallel:
            told = [(chain, scale) for chain, scale in group if not math.isnan(scale)]
            stream = sum((scale * chain.contribution.reshape(stream.shape) for chain, scale in told), stream)


def _grouped(chains: list[Chain], kinds: list[Kind]) -> list[list[int]]:
    """Which chains make one sublayer: those of one kind that read the same tensor."""
    groups: list[list[int]] = []
    for at, chain in enumerate(chains):
        alike = [group for group in groups if kinds[group[0]] == kinds[at]]
        group = next((group for group in alike if same(chains[group[0]].source, chain.source)), None)
        if group is None:
            groups.append([at])
        else:
            group.append(at)
    return groups


def _joined(
    layer_idx: int, kind: Kind, group: list[int], chains: list[Chain], scales: list[float], names: dict[nn.Module, str]
) -> Sublayer:
    """One sublayer of the chains of a group, the one with most parameters first."""
    others = [chain for at, chain in enumerate(chains) if at not in group]
    strands = [_describe(layer_idx, kind, chains[at], others, scales[at], names) for at in group]
    main = max(strands, key=lambda strand: sum(w.numel() for module in strand.body for w in module.parameters()))
    beside = tuple(strand for strand in strands if strand is not main)
    return replace(
        main,
        name="+".join([main.name, *(strand.name.rsplit(".", 1)[-1] for strand in beside)]),
        norms=tuple(dict.fromkeys(norm for strand in (main, *beside) for norm in strand.norms)),
        body=(*main.body, *(module for strand in beside for module in strand.body)),
        beside=beside,
    )


def _heavy(chain: Chain, others: list[Chain]) -> list[Seen]:
    """The modules of a chain that compute with matrices and belong to no other chain, or its end."""
    shared = [link for other in others for link in other.links]
    return [link for link in chain.links if link.has_matrices and link not in shared] or [chain.links[-1]]


def _kind(chain: Chain, others: list[Chain]) -> Kind:
    return "mlp" if all(_is_position_wise(link, chain) for link in _heavy(chain, others)) else "attention"


def _describe(
    layer_idx: int, kind: Kind, chain: Chain, others: list[Chain], scale: float, names: dict[nn.Module, str]
) -> Sublayer:
    shared = [link for other in others for link in other.links]
    links, heavy = chain.links, _heavy(chain, others)
    first, last = links.index(heavy[0]), links.index(heavy[-1])
    norms = [link for link in (*links[:first], *links[last + 1 :]) if link not in shared]
    return Sublayer(
        kind=kind,
        layer_idx=layer_idx,
        name="+".join([names[heavy[0].module], *(names[link.module].rsplit(".", 1)[-1] for link in heavy[1:])]),
        module=_dropping_module(chain, max(heavy, key=lambda link: link.num_parameters)),
        norms=tuple(names[link.module] for link in norms),
        links=tuple(
            Link(link.module, link.value.shape[-1], returned_by(link.call), gain)
            for link, gain in zip(links, chain.gains, strict=True)
        ),
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
