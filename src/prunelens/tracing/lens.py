"""The lens: residual streams of any depth read through the final norm and the head, and compared."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prunelens.metrics.head import LogitPairs, Stats, hidden_rows, merge, rows_per_chunk
from prunelens.models.model import Model
from prunelens.models.sizes import same_numbers
from prunelens.models.surgery.variant import Variant
from prunelens.tracing.layer_states import LayerStates, Places

Key = tuple[str, str]
"""(trace, label)."""


@dataclass(frozen=True)
class Lens:
    """Reads a stream as if the model ended there.

    `normed` reads it through the model's final norm and head, `raw` through the head alone.
    """

    model: Model
    name: str

    def states(self, stream: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
        """What enters the head."""
        norm = self.model.anatomy.final_norm
        return stream if self.name == "raw" or norm is None else self.model.network.get_submodule(norm)(stream)

    def _weights(self) -> dict[str, Tensor]:
        """What it may read: all that is outside the blocks, but for the norm that `raw` leaves out."""
        anatomy = self.model.anatomy
        left_out = [block.name for block in anatomy.blocks] + ([anatomy.final_norm] if self.name == "raw" else [])
        prefixes = tuple(f"{name}." for name in left_out if name is not None)
        return {name: own for name, own in self.model.network.named_parameters() if not name.startswith(prefixes)}

    def equals(self, other: "Lens") -> bool:
        """Whether both read the same: equal weights outside the blocks, and the same logits of a random state."""
        if self.model is other.model:
            return True
        own, others = (lens._weights() for lens in (self, other))
        if own.keys() != others.keys() or not all(same_numbers(own[name], others[name]) for name in own):
            return False
        state = torch.randn(1, other.model.anatomy.hidden_size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            left, right = (
                lens.model.head(lens.states(state.to(lens.model.device, lens.model.dtype))) for lens in (self, other)
            )
        gap = (left.cpu() - right.cpu()).abs().max()
        return bool(gap <= 1e-3 * right.abs().max().cpu())  # another scale or cap differs by more


@dataclass(frozen=True)
class _Read:
    """A stream through a lens."""

    states: Tensor
    logits: Tensor


class LensReader:
    """Compares the streams of a batch through one lens; its buffers serve all batches.

    Both streams of a sublayer (L1) are read through the dense model's lens, the streams in depth (L2) each through
    its own model's.
    """

    def __init__(self, dense: Model, variants: Mapping[str, Variant], name: str, temperature: float) -> None:
        self._dense = Lens(dense, name)
        self._own = {label: Lens(variant.model, name) for label, variant in variants.items()}
        self._same = {label: lens.equals(self._dense) for label, lens in self._own.items()}
        self._drops = any(variant.model is dense for variant in variants.values())
        self._pairing = LogitPairs(temperature)
        self._recent: list[tuple[Tensor, _Read]] = []

    def read(self, states: LayerStates, places: Places) -> dict[Key, list[Stats]]:
        """For each trace and model the statistics at the sampled steps, one entry per sublayer in order of depth."""
        found: dict[Key, list[list[Stats]]] = {}
        device = states.depth[0].device
        # With twins two streams share a head product, of the same size as one stream's without them.
        rows = rows_per_chunk(self._dense.model.anatomy.vocab_size, device) * 3 // (4 if states.twins else 2) or 1
        for start in range(0, len(places.sampled), rows):
            chunk = slice(start, start + rows)
            self._recent = []
            for index in range(len(states.sublayers)):
                for key, stats in self._read_sublayer(states, places, index, chunk):
                    found.setdefault(key, [[] for _ in states.sublayers])[index].append(stats)
        return {key: [merge(chunks) for chunks in parts] for key, parts in found.items()}

    def _read_sublayer(
        self, states: LayerStates, places: Places, index: int, chunk: slice
    ) -> Iterator[tuple[Key, Stats]]:
        sampled = places.sampled[chunk]
        tokens = places.token_ids[sampled]
        after, depth = states.after[index][chunk], states.depth[index][sampled]
        twins = {label: streams[index][chunk] for label, streams in states.twins.items()}
        dropped = [states.before[index][chunk]] if self._drops else []
        self._read_dense([*dropped, after, *twins.values()])
        local: dict[Key, _Read] = {("local", label): self._through_dense(stream) for label, stream in twins.items()}
        if self._drops:
            local["dropped", "dense"] = self._through_dense(dropped[0])
        deep = {
            ("cumulative", label): self._through_own(label, streams[index], sampled, depth)
            for label, streams in states.compressed_depth.items()
        }
        if torch.equal(after, depth):
            yield from self._compare(self._through_dense(depth), local | deep, tokens)
        else:
            yield from self._compare(self._through_dense(after), local, tokens)
            yield from self._compare(self._through_dense(depth), deep, tokens)

    def _compare(self, dense: _Read, others: Mapping[Key, _Read | None], tokens: Tensor) -> Iterator[tuple[Key, Stats]]:
        logits = [read.logits if read else None for read in others.values()]
        for (key, read), stats in zip(others.items(), self._pairing.compare(dense.logits, logits, tokens), strict=True):
            yield key, stats | hidden_rows(dense.states, read.states if read else dense.states)

    def _through_dense(self, stream: Tensor) -> _Read:
        """A stream read through the dense lens."""
        for known, read in self._recent:
            if torch.equal(known, stream):
                return read
        self._read_dense([stream])
        return self._recent[-1][1]

    def _read_dense(self, streams: list[Tensor]) -> None:
        """Read streams through the dense lens, two in one head product: a larger one costs less a row.

        What one sublayer writes the next one reads, so reads of these streams and of the last one stay.
        """
        known = [(stream, read) for stream, read in self._recent if any(torch.equal(stream, one) for one in streams)]
        new: list[Tensor] = []
        for stream in streams:
            if not any(torch.equal(stream, one) for one in [*new, *(one for one, _ in known)]):
                new.append(stream)
        for low in range(0, len(new), 2):
            together = new[low : low + 2]
            read = self._read(self._dense, torch.cat(together))
            sizes = [len(stream) for stream in together]
            parts = zip(together, read.states.split(sizes), read.logits.split(sizes), strict=True)
            known += [(stream, _Read(states, logits)) for stream, states, logits in parts]
        self._recent = known

    def _through_own(self, label: str, stream: Tensor | None, sampled: Tensor, dense: Tensor) -> _Read | None:
        """A stream read through its own lens; None for the dense one's stream and lens."""
        if stream is None or (self._same[label] and torch.equal(stream[sampled], dense)):
            return None
        return self._read(self._own[label], stream[sampled])

    def _read(self, lens: Lens, stream: Tensor) -> _Read:
        states = lens.states(stream)
        return _Read(states, lens.model.head(states))
