"""Rows of `steps` in free running (L4): read where both texts are still the same, measured where they are not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunelens.metrics.survival import common_prefix
from prunelens.study.compare.tables import SURVIVAL_STATS, Stats
from prunelens.tracing.forced import Trajectory
from prunelens.tracing.free import first_other
from prunelens.tracing.generate import Continuation

Measure = Callable[[Tensor, Tensor, Tensor], Stats]
"""Row statistics of (dense states, compressed states, tokens)."""


PIECE_TOKENS = 4096
"""Steps whose row statistics are held at once."""


@dataclass
class Reading:
    """What is kept of one candidate's teacher-forced pass, text by text, once its rows are written.

    Attributes:
        survival: of each text, the statistics that survival is made of.
        known: of each greedy text, the steps before the candidate chooses another token.
        shared: of each greedy text, all statistics up to that choice and including it.
    """

    survival: list[Stats] = field(default_factory=list)
    known: list[int] = field(default_factory=list)
    shared: list[Stats] = field(default_factory=list)

    def add(self, texts: Sequence[Trajectory], stats: Stats) -> None:
        """Take over consecutive texts, one after the other in `stats`."""
        for text, own in zip(texts, by_text(texts, stats), strict=True):
            self.survival.append({name: own[name].clone() for name in SURVIVAL_STATS})
            if text.trace == "greedy":
                known = first_other(text.token_ids, own["top_ids_compressed"][:, 0], own["same_top1"])
                self.known.append(known)
                self.shared.append({name: value[: known + 1].clone() for name, value in own.items()})


def in_pieces(trajectories: Sequence[Trajectory]) -> Iterator[tuple[slice, list[Trajectory]]]:
    """(rows, trajectories) of consecutive pieces: whole texts of one trace, about `PIECE_TOKENS` steps together."""
    start, piece = 0, list[Trajectory]()
    for text in trajectories:
        steps = sum(len(own.token_ids) for own in piece)
        if piece and (steps >= PIECE_TOKENS or text.trace != piece[0].trace):
            yield slice(start, start + steps), piece
            start, piece = start + steps, []
        piece.append(text)
    if piece:
        yield slice(start, start + sum(len(own.token_ids) for own in piece)), piece


def by_text(trajectories: Sequence[Trajectory], stats: Stats) -> list[Stats]:
    """Row statistics of consecutive trajectories, each by itself."""
    lengths = [len(trajectory.token_ids) for trajectory in trajectories]
    pieces = {name: value.split(lengths) for name, value in stats.items()}
    return [{name: pieces[name][row] for name in pieces} for row in range(len(trajectories))]


def free_trajectories(read: Sequence[Trajectory], free: Sequence[Continuation]) -> list[Trajectory]:
    """The steps that both texts have: the dense greedy texts, cut where the compressed ones end."""
    return [
        Trajectory(text.prompt, "free", text.prompt_ids, text.token_ids[: len(own.token_ids)], text.ended)
        for text, own in zip(read, free, strict=True)
    ]


def free_stats(
    read: Sequence[Trajectory],
    dense_states: Tensor,
    forced: Sequence[Stats],
    free: Sequence[Continuation],
    measure: Measure,
) -> Stats:
    """Row statistics of `free_trajectories`, one after the other.

    Up to the first different token and including it both models have read the same tokens, so these steps are those
    of the teacher-forced pass (L3); beyond what `forced` holds, the states with which the compressed text was written
    are compared.

    Args:
        read: the dense greedy texts.
        dense_states: (T, d), the dense model's states at all their steps.
        forced: the teacher-forced statistics of each of them, up to the candidate's first other choice (`Reading`).
        free: the compressed greedy texts.
        measure: compares states.
    """
    spans = list(_spans(read, free, [len(stats["tv"]) for stats in forced]))
    own = [
        text.states[same - text.start : stop - text.start] for (_, same, stop), text in zip(spans, free, strict=True)
    ]
    dense = [dense_states[start + same : start + stop] for start, same, stop in spans]
    tokens = [token for (_, same, stop), text in zip(spans, read, strict=True) for token in text.token_ids[same:stop]]
    kept = [
        {name: value[:same] for name, value in stats.items()} for stats, (_, same, _) in zip(forced, spans, strict=True)
    ]
    if not tokens:
        return _joined(kept)
    found = measure(torch.cat(dense), torch.cat(own), torch.tensor(tokens))
    lengths = [stop - same for _, same, stop in spans]
    written = {name: value.split(lengths) for name, value in found.items()}
    parts = [part for row, one in enumerate(kept) for part in (one, {name: written[name][row] for name in written})]
    return _joined(parts)


def _spans(
    read: Sequence[Trajectory], free: Sequence[Continuation], kept: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """(place of a text's first step, steps in the same context whose statistics are kept, steps of both texts)."""
    start = 0
    for text, own, most in zip(read, free, kept, strict=True):
        steps = min(len(text.token_ids), len(own.token_ids))
        yield start, min(common_prefix(text.token_ids, own.token_ids, steps) + 1, steps, most), steps
        start += len(text.token_ids)


def _joined(parts: Sequence[Stats]) -> Stats:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
