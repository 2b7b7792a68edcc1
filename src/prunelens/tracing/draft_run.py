"""What speculative decoding took: two sets of texts with their times, and what follows from them (S5 measured)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prunelens.metrics.survival import agreed_length


@dataclass(frozen=True)
class Round:
    """What a draft proposed at once: its tokens, from which token of the text on, and how long it took."""

    start: int
    token_ids: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class DraftedText:
    """One text and how it came about.

    Attributes:
        token_ids: the new tokens, EOS included where it was reached.
        seconds: the whole time.
        first_seconds: the part of it until the dense model had read the prompt.
        dense_calls: passes of the dense model.
        rounds: what the draft proposed; empty where the dense model wrote alone.
    """

    token_ids: tuple[int, ...]
    seconds: float
    first_seconds: float
    dense_calls: int
    rounds: tuple[Round, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """The speed that a reader of the text sees, the prompt included."""
        return len(self.token_ids) / self.seconds

    @property
    def examined(self) -> int:
        """Drafted tokens that were judged: those before the first rejected one, and that one."""
        return sum(min(kept + 1, judged) for kept, judged in self._kept())

    @property
    def accepted(self) -> int:
        """Drafted tokens that stand in the text."""
        return sum(kept for kept, _ in self._kept())

    def _kept(self) -> Iterator[tuple[int, int]]:
        """(tokens kept, tokens that could be kept) of each round; what replaces a rejected token is never the same."""
        for each in self.rounds:
            pairs = zip(self.token_ids[each.start :], each.token_ids, strict=False)
            same = [own == drafted for own, drafted in pairs]
            yield agreed_length(same, len(same)), len(same)


@dataclass(frozen=True)
class DraftRun:
    """The same prompts continued by the dense model alone and with a draft, one text each.

    Seconds per step leave out the first pass, which reads the prompt. With them, a text is written about
    tokens_per_dense_call / (num_drafted · cost_ratio + check_ratio) times as fast; the forecast (S5) takes
    check_ratio as 1.
    """

    plain: tuple[DraftedText, ...]
    assisted: tuple[DraftedText, ...]
    num_drafted: int

    @property
    def plain_tokens_per_second(self) -> float:
        """Speed of the dense model alone."""
        return _speed(self.plain)

    @property
    def assisted_tokens_per_second(self) -> float:
        """Speed with the draft."""
        return _speed(self.assisted)

    @property
    def speedup(self) -> float:
        """Speed with the draft over the speed without it; below 1 the draft makes it slower."""
        return self.assisted_tokens_per_second / self.plain_tokens_per_second

    @property
    def speedup_range(self) -> tuple[float, float]:
        """(lowest, highest) ratio of the two speeds on one prompt, and the overall ratio lies inside."""
        pairs = zip(self.assisted, self.plain, strict=True)
        found = [own.tokens_per_second / alone.tokens_per_second for own, alone in pairs]
        return min(*found, self.speedup), max(*found, self.speedup)

    @property
    def examined(self) -> int:
        """Drafted tokens that the dense model judged."""
        return sum(text.examined for text in self.assisted)

    @property
    def accepted(self) -> int:
        """Drafted tokens that it kept."""
        return sum(text.accepted for text in self.assisted)

    @property
    def acceptance(self) -> float | None:
        """Accepted over examined; None where nothing was drafted."""
        return self.accepted / self.examined if self.examined else None

    @property
    def tokens_per_dense_call(self) -> float:
        """New tokens for each pass of the dense model; num_drafted + 1 at most."""
        return sum(len(text.token_ids) for text in self.assisted) / sum(text.dense_calls for text in self.assisted)

    @property
    def cost_ratio(self) -> float | None:
        """Seconds for a drafted token over those for a token of the dense model alone; None if texts are too short."""
        later = [each for text in self.assisted for each in text.rounds[1:]]
        tokens = sum(len(each.token_ids) for each in later)
        return _over(sum((each.seconds for each in later), 0.0), tokens, self._step())

    @property
    def check_ratio(self) -> float | None:
        """Seconds for judging a draft over those for a token of the dense model alone; None as above."""
        drafting = sum(each.seconds for text in self.assisted for each in text.rounds[1:])
        later = sum(text.seconds - text.first_seconds for text in self.assisted) - drafting
        return _over(later, sum(text.dense_calls - 1 for text in self.assisted), self._step())

    def _step(self) -> float | None:
        """Seconds for a token of the dense model alone."""
        later = sum(text.seconds - text.first_seconds for text in self.plain)
        return _over(later, sum(text.dense_calls - 1 for text in self.plain), 1.0)


def _speed(texts: Sequence[DraftedText]) -> float:
    return sum(len(text.token_ids) for text in texts) / sum(text.seconds for text in texts)


def _over(seconds: float, count: int, unit: float | None) -> float | None:
    """Seconds for one of `count`, in units; None where nothing was counted."""
    return seconds / count / unit if count and unit else None
