"""Where blocks, sublayers, norms and head of a decoder are: found by structure, proved on load.

A sublayer is what adds to the residual stream. One short forward pass is watched: inside a block the child
modules form chains (norm → attention, norm → MLP, attention → norm, …) in which each reads what the one
before wrote, and the ends of the chains are added to the residual stream. Nothing is taken from names, and
nothing is believed before the stream, the logits and causality have been checked on real numbers.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunelens.errors import PrunelensError
from prunelens.models.placement import input_device
from prunelens.models.taps import (
    decoder_of,
    first_tensor,
    head_of,
    input_tensor,
    record_outputs,
    replay_from,
    run_decoder,
)

Kind = Literal["attention", "mlp"]
PROBE_LENGTH = 8
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Sublayer:
    """A module whose output, times `scale`, is added to the residual stream of block `layer_idx`.

    `chain` runs from the module that reads the stream to the one whose output is added (norm, module, norm);
    `norms` are those of it that serve only this sublayer. `num_outputs` is 0 for a module that returns a tensor,
    else the length of the tuple it returns. `adds_residual` tells that the output holds the stream already.
    """

    kind: Kind
    layer_idx: int
    name: str
    module: nn.Module
    norms: tuple[str, ...]
    chain: tuple[nn.Module, ...]
    num_outputs: int
    scale: float
    adds_residual: bool = False

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
    num_outputs: int

    def find(self, kind: Kind) -> Sublayer | None:
        """The sublayer of this kind, if the block has one."""
        return next((part for part in self.sublayers if part.kind == kind), None)


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal decoder, as found and proved on load."""

    decoder: str
    blocks: tuple[Block, ...]
    final_norm: str | None
    head: str
    hidden_size: int
    vocab_size: int

    def sublayers(self, kind: Kind) -> list[Sublayer]:
        """All sublayers of one kind, in order of depth."""
        found = (block.find(kind) for block in self.blocks)
        return [part for part in found if part is not None]


@dataclass
class _Call:
    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: Tensor
    result: Tensor
    num_outputs: int


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a Hugging Face causal decoder and prove the finding on a short input.

    Raises:
        PrunelensError: not a causal decoder, or a part that does not rebuild; the part is named.
    """
    decoder = decoder_of(model)
    names = {module: name for name, module in model.named_modules()}
    ids = _probe_ids(model)
    with torch.inference_mode():
        _check_causality(model, ids)
    layers = _find_layers(decoder, names)
    watched = [child for layer in layers for child in layer.children()]
    with torch.inference_mode():
        calls, hidden = _watch(decoder, [*layers, *watched, *decoder.children()], ids)
        blocks = tuple(_find_block(idx, layer, calls, names) for idx, layer in enumerate(layers))
        _check_stream(calls, layers, names)
        final_norm = _find_final_norm(calls, layers[-1], decoder, hidden, names)
        head = head_of(model)
        logits = model(input_ids=ids, use_cache=False).logits
        _expect_close(head(hidden.flatten(0, 1)), logits.flatten(0, 1), "language-model head")
        _check_replay(model, layers, ids, hidden)
    output = model.get_output_embeddings()  # type: ignore[operator]
    return Anatomy(
        decoder=names[decoder],
        blocks=blocks,
        final_norm=final_norm,
        head=names.get(output, "") if output is not None else "",
        hidden_size=hidden.shape[-1],
        vocab_size=logits.shape[-1],
    )


def _find_layers(decoder: nn.Module, names: dict[nn.Module, str]) -> list[nn.Module]:
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    expected = getattr(decoder.config, "num_hidden_layers", None)
    matching = [layers for layers in lists if len(layers) == expected] or lists
    if len(matching) != 1 or len(matching[0]) == 0:
        raise PrunelensError(
            f"expected one list of {expected} decoder layers in {type(decoder).__name__} "
            f"({names[decoder] or 'the model'}), found {[len(layers) for layers in lists]}; "
            "this model family is not supported"
        )
    return list(matching[0])


def _probe_ids(model: nn.Module) -> Tensor:
    vocab_size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (1, PROBE_LENGTH), generator=generator).to(input_device(model))


def _watch(decoder: nn.Module, modules: list[nn.Module], ids: Tensor) -> tuple[dict[nn.Module, _Call], Tensor]:
    """Run the decoder once and note what each module read and wrote."""
    calls: dict[nn.Module, _Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        source, result = input_tensor(args, kwargs), first_tensor(output)
        if source is not None and result is not None:
            num_outputs = len(output) if isinstance(output, tuple) else 0
            calls[module] = _Call("", module, args, kwargs, source, result, num_outputs)

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in dict.fromkeys(modules)]
    try:
        hidden = run_decoder(decoder, ids)
    finally:
        for handle in handles:
            handle.remove()
    return calls, hidden


def _same(left: Tensor, right: Tensor) -> bool:
    return left.data_ptr() == right.data_ptr() and left.numel() == right.numel()


def _find_block(layer_idx: int, layer: nn.Module, calls: dict[nn.Module, _Call], names: dict[nn.Module, str]) -> Block:
    if layer not in calls:
        raise PrunelensError(f"decoder layer {names[layer]} was not run; this model is not supported")
    call = calls[layer]
    inner = [calls[child] for child in layer.children() if child in calls]
    inner = [part for part in inner if not _same(part.source, part.result)]  # dropout at rest
    chains = _chains(inner)
    contributions = [chain[-1].result for chain in chains]
    source = call.source.to(call.result.device)  # the layer before may be on another device
    scales = _solve_scales(source, call.result, contributions, names[layer])
    found = [_describe(layer_idx, chain, chains, scale, names) for chain, scale in zip(chains, scales, strict=True)]
    kinds = [part.kind for part in found]
    if kinds not in (["attention", "mlp"], ["mlp", "attention"], ["attention"], ["mlp"]):
        raise PrunelensError(
            f"expected one attention and one MLP in {names[layer]}, found {kinds or 'nothing'} "
            f"({', '.join(part.name for part in found)}); this model family is not supported"
        )
    parallel = len(chains) == 2 and _same(chains[0][0].source, chains[1][0].source)
    if len(chains) == 2 and not parallel:
        middle = source + scales[0] * contributions[0]
        _expect_close(chains[1][0].source, middle, f"residual stream inside {names[layer]}")
    layout: Literal["sequential", "parallel"] = "parallel" if parallel else "sequential"
    return Block(layer_idx, names[layer], layer, layout, tuple(found), call.num_outputs)


def _chains(calls: list[_Call]) -> list[list[_Call]]:
    """Chains of modules in which each reads what the one before wrote; a shared head starts several."""
    ends = [call for call in calls if not any(_same(call.result, other.source) for other in calls)]
    chains = []
    for end in ends:
        chain = [end]
        while True:
            before = [call for call in calls if call not in chain and _same(call.result, chain[0].source)]
            if not before:
                break
            chain.insert(0, before[0])
        chains.append(chain)
    return chains


def _solve_scales(source: Tensor, result: Tensor, parts: list[Tensor], name: str) -> list[float]:
    """Numbers s with result = source + Σ s·part; 1 for every family without a residual multiplier."""
    if not parts or any(part.shape != source.shape for part in parts):
        raise PrunelensError(f"the parts of {name} do not add up to its residual stream; this family is not supported")
    wanted = (result - source).double().flatten()
    matrix = torch.stack([part.double().flatten() for part in parts], dim=1)
    ones = torch.ones(len(parts), dtype=torch.float64, device=matrix.device)
    scale = max(float(source.double().norm()), float(result.double().norm()))
    tolerance = TOLERANCE.get(source.dtype, 1e-1) * scale
    if float((matrix @ ones - wanted).norm()) <= tolerance:
        return [1.0] * len(parts)
    solution = torch.linalg.lstsq(matrix.cpu(), wanted.cpu().unsqueeze(1)).solution.squeeze(1)
    if float((matrix.cpu() @ solution - wanted.cpu()).norm()) > tolerance:
        raise PrunelensError(
            f"the residual stream of {name} could not be rebuilt from its sublayers; this model family is not supported"
        )
    return [float(value) for value in solution]


def _describe(
    layer_idx: int,
    chain: list[_Call],
    chains: list[list[_Call]],
    scale: float,
    names: dict[nn.Module, str],
) -> Sublayer:
    core = max(chain, key=lambda call: sum(weight.numel() for weight in call.module.parameters()))
    others = [call for other in chains if other is not chain for call in other]
    norms = tuple(names[call.module] for call in chain if call is not core and call not in others)
    kind: Kind = "mlp" if _is_position_wise(core) else "attention"
    modules = tuple(call.module for call in chain)
    return Sublayer(kind, layer_idx, names[core.module], core.module, norms, modules, core.num_outputs, scale)


def _is_position_wise(call: _Call) -> bool:
    """Whether each position is computed from itself alone: an MLP, not a mixer of tokens."""
    tensors = [value for value in (*call.args, *call.kwargs.values()) if value is not None]
    if len(tensors) != 1 or call.source.ndim != 3:
        return False
    part = first_tensor(call.module(call.source[:, 1:2]))
    if part is None:
        return False
    expected = call.result[:, 1:2].double()
    return bool((part.double() - expected).norm() <= TOLERANCE.get(part.dtype, 0.1) * expected.norm())


def _check_stream(calls: dict[nn.Module, _Call], layers: list[nn.Module], names: dict[nn.Module, str]) -> None:
    for before, after in pairwise(layers):
        if not torch.equal(calls[before].result, calls[after].source):
            raise PrunelensError(
                f"{names[after]} does not read what {names[before]} returns; this model is not supported"
            )


def _find_final_norm(
    calls: dict[nn.Module, _Call],
    last: nn.Module,
    decoder: nn.Module,
    hidden: Tensor,
    names: dict[nn.Module, str],
) -> str | None:
    stream = calls[last].result
    for child in decoder.children():
        call = calls.get(child)
        if call is not None and _same(call.source, stream) and child is not last:
            _expect_close(call.result, hidden, f"final norm {names[child]}")
            return names[child]
    _expect_close(stream, hidden, "state that enters the head (no final norm was found)")
    return None


def _check_causality(model: nn.Module, ids: Tensor) -> None:
    decoder, vocab_size = decoder_of(model), model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % vocab_size
    before, after = (run_decoder(decoder, tokens)[:, :-1] for tokens in (ids, changed))
    if not _close(after, before):
        raise PrunelensError(
            f"expected a causal decoder, but in {type(model).__name__} a token changes the states before it; "
            "only causal language models can be compared"
        )


def _check_replay(model: nn.Module, layers: list[nn.Module], ids: Tensor, hidden: Tensor) -> None:
    start = len(layers) // 2
    if start == 0:
        return
    decoder = decoder_of(model)
    with record_outputs(layers, [start - 1]) as recorded:
        run_decoder(decoder, ids)
    with replay_from(layers, start, recorded[start - 1]):
        _expect_close(run_decoder(decoder, ids), hidden, f"replay from layer {start}")


def _close(found: Tensor, expected: Tensor) -> bool:
    difference = (found.to(expected.device).double() - expected.double()).norm()
    return bool(difference <= TOLERANCE.get(expected.dtype, 0.1) * expected.double().norm())


def _expect_close(found: Tensor, expected: Tensor, part: str) -> None:
    if found.shape != expected.shape or not _close(found, expected):
        raise PrunelensError(
            f"the {part} could not be rebuilt from the model's parts; this model family is not supported"
        )
