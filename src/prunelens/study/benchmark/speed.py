"""How fast and how large models are, side by side in one run: prefill, decoding, memory, KV cache and weights.

Every repeat runs all models in turn, so that a busy machine hits all alike, and a ratio to the dense model is taken
inside a repeat. All read the same random tokens: what a text says does not change its cost.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from prunelens.errors import PrunelensError
from prunelens.memory import is_out_of_memory
from prunelens.models.model import Model
from prunelens.models.sizes import is_quantized, network_bytes, tensor_bytes
from prunelens.models.surgery.drop import NOTHING, kept_weights
from prunelens.models.surgery.variant import Variant
from prunelens.progress import Advance
from prunelens.pruning.matrices import zero_share
from prunelens.study.benchmark.record import Speed, SpeedSettings, Spread
from prunelens.study.benchmark.timing import Added, Timing, added_memory, cuda_devices, time_once

MANY_ZEROS = 0.2
"""Share of zeros above which a reader may expect that they save something."""


@dataclass
class _Watched:
    """One model's numbers while they are collected."""

    variant: Variant
    timed: list[Timing] = field(default_factory=list)
    added: Added = field(default_factory=Added)


def measure_speeds(variants: Mapping[str, Variant], settings: SpeedSettings, advance: Advance) -> list[Speed]:
    """Measure models in one interleaved run.

    Args:
        variants: by label, the dense model first.
        settings: what is run.
        advance: called with 1 after each of the `settings.num_runs` runs.

    Raises:
        PrunelensError: no models, settings without meaning, a text longer than a model's positions, a model that
            returns no cache, or memory that does not suffice.
    """
    settings.check()
    check_lengths(variants, settings)
    with _memory_explained("this machine", settings):
        ids = _random_ids(variants, settings)
    watched = {label: _Watched(variant) for label, variant in variants.items()}
    for one_pass in (_warm_up, _watch_memory, *[_time] * settings.repeats):
        for label, found in watched.items():
            with _memory_explained(label, settings):
                one_pass(found, ids, settings.context)
            advance(1)
    return _results(watched, settings)


def check_lengths(variants: Mapping[str, Variant], settings: SpeedSettings) -> None:
    """Refuse a text that is longer than a model's positions, and a model that cannot decode with its cache.

    Raises:
        PrunelensError: it is, for the model named.
    """
    if not variants:
        raise PrunelensError("expected at least one model to measure, found none; name the dense one")
    asked = settings.context + settings.new_tokens
    for label, variant in variants.items():
        if not variant.model.anatomy.manner.cached:
            raise PrunelensError(
                f"expected a cache that gives the states of a whole pass to decode with, found that the one of {label} "
                "does not; leave it out of the benchmark"
            )
        limit = variant.model.context_length
        if limit is not None and asked > limit:
            raise PrunelensError(
                f"expected --context and --new-tokens of at most {limit} together, which is all that {label} reads, "
                f"found {settings.context} + {settings.new_tokens}; lower --context"
            )


def _random_ids(variants: Mapping[str, Variant], settings: SpeedSettings) -> Int64[Tensor, "B T"]:
    """The prompts with their new tokens, on the CPU."""
    vocabulary = min(variant.model.anatomy.vocab_size for variant in variants.values())
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch_size, settings.context + settings.new_tokens)
    return torch.randint(vocabulary, shape, generator=generator)


def _warm_up(found: _Watched, ids: Int64[Tensor, "B T"], context: int) -> None:
    time_once(found.variant, ids, context)


def _watch_memory(found: _Watched, ids: Int64[Tensor, "B T"], context: int) -> None:
    with added_memory(found.variant.model) as found.added:
        time_once(found.variant, ids, context)


def _time(found: _Watched, ids: Int64[Tensor, "B T"], context: int) -> None:
    found.timed.append(time_once(found.variant, ids, context))


@contextmanager
def _memory_explained(label: str, settings: SpeedSettings) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        asked = f"{settings.batch_size} x ({settings.context} + {settings.new_tokens}) tokens"
        raise PrunelensError(f"{label} has no memory for {asked}; lower --batch-size or --context") from error


def _results(watched: dict[str, _Watched], settings: SpeedSettings) -> list[Speed]:
    """The measured numbers of each model, in the order given."""
    base = next(iter(watched.values()))
    speeds = [_speed(label, found, base, settings) for label, found in watched.items()]
    return [
        replace(speed, notes=(*_savings(speed, speeds[0], found.variant), *_conditions(speed, found)))
        for speed, found in zip(speeds, watched.values(), strict=True)
    ]


def _speed(label: str, found: _Watched, dense: _Watched, settings: SpeedSettings) -> Speed:
    model, drop, cache = found.variant.model, found.variant.drop, found.timed[0].cache
    prefill, decode = (settings.batch_size * count for count in (settings.context, settings.new_tokens))
    in_memory = _weight_bytes(found.variant)
    ratios = (None, None) if found is dense else _ratios(dense, found)
    return Speed(
        label=label,
        settings=settings,
        device=_device_words(model),
        dtype=str(model.dtype).removeprefix("torch."),
        prefill_tokens_per_second=Spread.of([prefill / run.prefill_seconds for run in found.timed]),
        decode_tokens_per_second=Spread.of([decode / run.decode_seconds for run in found.timed]),
        prefill_ratio=ratios[0],
        decode_ratio=ratios[1],
        peak_memory_bytes=None if found.added.num_bytes is None else in_memory + found.added.num_bytes,
        memory_source=found.added.source,
        kv_bytes_per_token=cache.kv_bytes / prefill,
        state_bytes=cache.state_bytes / settings.batch_size,
        weight_bytes_in_memory=in_memory,
        weight_bytes_stored=(model.weight_bytes or None) if drop == NOTHING else None,
        zero_fraction=zero_share(block for block in model.anatomy.blocks if block.layer_idx not in drop.block),
        notes=(),
    )


def _ratios(dense: _Watched, found: _Watched) -> tuple[Spread, Spread]:
    """How many times the dense model's speed, in prefill and decoding."""
    pairs = list(zip(dense.timed, found.timed, strict=True))
    return (
        Spread.of([base.prefill_seconds / own.prefill_seconds for base, own in pairs]),
        Spread.of([base.decode_seconds / own.decode_seconds for base, own in pairs]),
    )


def _weight_bytes(variant: Variant) -> int:
    """Bytes of the weights that are read."""
    network, anatomy = variant.model.network, variant.model.anatomy
    whole, kept = (sum(map(tensor_bytes, kept_weights(network, anatomy, drop))) for drop in (NOTHING, variant.drop))
    return network_bytes(network) - (whole - kept)


def _device_words(model: Model) -> str:
    names = [torch.cuda.get_device_name(device) for device in cuda_devices(model)]
    own = f"cpu, threads: {torch.get_num_threads()}" if model.device.type == "cpu" else str(model.device)
    return ", ".join(names) or own


def _savings(speed: Speed, dense: Speed, variant: Variant) -> Iterator[str]:
    """Where a model saves nothing."""
    if speed.zero_fraction > MANY_ZEROS:
        yield (
            f"{100 * speed.zero_fraction:.0f} % of the numbers in its blocks' matrices are zeros, but they are stored "
            "and multiplied like others: no time and no memory is saved without a sparse kernel or format"
        )
    elif speed is not dense and speed.weight_bytes_in_memory > 0.99 * dense.weight_bytes_in_memory:
        yield "its weights take as much memory as the dense model's"
    weights = [weight for block in variant.model.anatomy.blocks for weight in block.module.parameters()]
    quantized = any(is_quantized(weight) or not weight.is_floating_point() for weight in weights)
    for name, ratio in (("prefill", speed.prefill_ratio), ("decoding", speed.decode_ratio)):
        if ratio is None:
            continue
        times = f"{ratio.low:.2f} to {ratio.high:.2f} times its speed"
        if ratio.low <= 1 <= ratio.high:
            yield f"{name}: no difference from the dense model that could be measured ({times})"
        elif quantized and ratio.high < 1:
            yield (
                f"{name}: slower than the dense model ({times}), as fewer bits save time only with a kernel made for "
                "them on this device"
            )


def _conditions(speed: Speed, found: _Watched) -> Iterator[str]:
    """What the numbers depend on."""
    if found.variant.drop != NOTHING:
        yield "the weights of the parts taken out are not counted, though they stay in memory here"
    stored = speed.weight_bytes_stored
    if stored is not None and speed.weight_bytes_in_memory > 1.5 * stored:
        times = speed.weight_bytes_in_memory / stored
        yield f"its weights take {times:.1f} times as much memory as on disk, because they were opened in {speed.dtype}"
    if any(weight.is_meta for weight in found.variant.model.network.parameters()):
        yield "some weights wait in main memory or on disk and are fetched in each pass; they count as in memory"
    windows = found.timed[0].cache.windows
    if windows:
        yield (
            f"{len(windows)} of its layers keep at most the last {max(windows)} tokens, so that the KV bytes per token "
            "fall as the context grows beyond them"
        )
