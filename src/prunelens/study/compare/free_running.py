"""Rows of `steps` in free running (L4): read where both texts are still the same, measured where they are not."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from prunelens.metrics.survival import common_prefix
from prunelens.study.compare.tables import Stats
from prunelens.tracing.forced import Trajectory
from prunelens.tracing.generate import Continuation

Measure = Callable[[Tensor, Tensor, Tensor], Stats]
"""Row statistics of (dense states, compressed states, tokens)."""


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
    of the teacher-forced pass (L3); beyond it the states with which the compressed text was written are compared.

    Args:
        read: the dense greedy texts.
        dense_states: (T, d), the dense model's states at all their steps.
        forced: the teacher-forced statistics of each of them.
        free: the compressed greedy texts.
        measure: compares states.
    """
    spans = list(_spans(read, free))
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


def _spans(read: Sequence[Trajectory], free: Sequence[Continuation]) -> Iterator[tuple[int, int, int]]:
    """(place of a text's first step, steps read in the same context, steps of both texts)."""
    start = 0
    for text, own in zip(read, free, strict=True):
        steps = min(len(text.token_ids), len(own.token_ids))
        yield start, min(common_prefix(text.token_ids, own.token_ids, steps) + 1, steps), steps
        start += len(text.token_ids)


def _joined(parts: Sequence[Stats]) -> Stats:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
