"""How often each 95 % interval holds the truth, how often a verdict is wrong, and what that costs: all by simulation.

Needs numpy only, no model. Prints the tables of docs/coverage.md; the seed alone decides the draws.

    python benchmarks/coverage.py [--runs 400] [--seed 0]
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from prunelens.metrics.betting import ALPHA, log_capital
from prunelens.metrics.intervals import Interval, exact_share, ratio_interval
from prunelens.metrics.statistics import kept_share, paired_difference
from prunelens.metrics.survival import mean_curve
from prunelens.study.evaluate.words import BROKEN, DEGRADED, SAFE, Limits

SIZES = (8, 16, 36, 64, 112, 224)
RIGHT = 0.75
"""Share of the items that the dense model gets right."""
KEPT, LOOPS = Limits(0.95, 0.80), Limits(0.05, 0.25, higher=False)
LOOKS = 2000
Generator = np.random.Generator
Draw = Callable[[Generator, int], Interval | None]


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=400, help="simulated samples of each cell (default 400)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes = [f"{size}" for size in SIZES]
    print(
        f"{options.runs} runs a cell. Coverage in %; in brackets % of runs with the truth below / above the interval."
    )
    for title, cases in CASES.items():
        _print(
            title, ["truth", *sizes], ([name, *cells] for name, cells in coverage(cases, options.runs, options.seed))
        )
    headings = ["truth", "word", *sizes]
    _print("Verdicts of a share kept, % of runs", headings, words(KEPT, SHARES, _kept, options.runs, options.seed))
    _print("Verdicts of looping texts, % of runs", headings, words(LOOPS, RATES, _loops, options.runs, options.seed))
    headings = ["truth", "not at least 95 %", "not at least 80 %", "median items until degraded", "until broken"]
    _print(f"Betting, looked at after each of {LOOKS} items, % of runs", headings, early(options.runs, options.seed))


def coverage(cases: Sequence[tuple[str, float, Draw]], runs: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    """For each case its name and a cell for each size: coverage (truth below / above)."""
    for name, truth, draw in cases:
        yield name, [in_percent(*misses(draw, truth, size, runs, seed)) for size in SIZES]


def misses(draw: Draw, truth: float, size: int, runs: int, seed: int) -> tuple[float, float]:
    """(share of runs with the truth below the interval, with the truth above it)."""
    generator = np.random.default_rng([seed, size])
    found = [interval for _ in range(runs) if (interval := draw(generator, size)) is not None]
    below = sum(truth < one.low - 1e-12 for one in found)
    above = sum(truth > one.high + 1e-12 for one in found)
    return below / len(found), above / len(found)


def in_percent(below: float, above: float) -> str:
    """98.2 (0.3 / 1.5)."""
    return f"{100 * (1 - below - above):.1f} ({100 * below:.1f} / {100 * above:.1f})"


def words(
    limits: Limits,
    truths: Sequence[tuple[float, float]],
    draw: Callable[..., Interval | None],
    runs: int,
    seed: int,
) -> Iterator[list[str]]:
    """For each truth and word how often it is said; wrong ones are marked."""
    for truth, gains in truths:
        one = partial(draw, more=truth, gains=gains)
        said = {size: _said(limits, one, size, runs, seed) for size in SIZES}
        right = limits.word(truth, truth)
        for word in (SAFE, DEGRADED, BROKEN):
            wrong = word == SAFE != right or (word == BROKEN != right) or (word == DEGRADED and right == SAFE)
            name = f"{100 * truth:g} %, {100 * gains:g} % gain"
            cells = [f"{100 * said[size].count(word) / max(len(said[size]), 1):.1f}" for size in SIZES]
            yield [name, f"{word} (wrong)" if wrong else word, *cells]


def _said(limits: Limits, draw: Draw, size: int, runs: int, seed: int) -> list[str]:
    generator = np.random.default_rng([seed, size, 1])
    found = [interval for _ in range(runs) if (interval := draw(generator, size)) is not None]
    return [limits.word(one.low, one.high) for one in found]


def early(runs: int, seed: int) -> Iterator[list[str]]:
    """What the betting tests say of one task, and how soon."""
    generator = np.random.default_rng([seed, 2])
    for keep, gains in ((1.0, 0.02), (0.95, 0.0), (0.95, 0.05), (0.9, 0.02), (0.8, 0.02), (0.7, 0.02), (0.4, 0.02)):
        dense, own = _answers(generator, (LOOKS, runs), keep, gains)
        after = [_first(own - limit * dense) for limit in (KEPT.safe, KEPT.broken)]
        shares = [f"{100 * np.mean(np.isfinite(one)):.1f}" for one in after]
        medians = [f"{np.median(one):.0f}" if np.isfinite(np.median(one)) else "—" for one in after]
        yield [f"{100 * keep:g} %, {100 * gains:g} % gain", *shares, *medians]


def _first(values: np.ndarray) -> np.ndarray:
    above = log_capital(values, np.ones(values.shape[1])) >= -np.log(ALPHA)
    return np.where(above.any(axis=0), above.argmax(axis=0) + 1.0, np.inf)


# --------------------------------------------------------------------------- what is drawn


def _answers(
    generator: Generator, shape: tuple[int, ...], keep: float, gains: float, right: float = RIGHT
) -> tuple[np.ndarray, np.ndarray]:
    """Right answers of the dense model, and of one that keeps `keep` on balance; `gains` of all items are gained."""
    dense = (generator.random(shape) < right).astype(float)
    draws = generator.random(shape)
    own = np.where(dense == 1, draws >= 1 - keep + gains / right, draws < gains / (1 - right))
    return dense, own.astype(float)


def _share(truth: float) -> Draw:
    return lambda generator, size: exact_share(int(generator.binomial(size, truth)), size)


def _difference(lost: float, gained: float) -> Draw:
    def draw(generator: Generator, size: int) -> Interval:
        dense, own = _answers(generator, (size,), 1 - (lost - gained) / RIGHT, gained)
        return paired_difference(dense, own)

    return draw


def _kept(generator: Generator, size: int, more: float, gains: float) -> Interval | None:
    """The share kept of one task; `more` is that share."""
    return kept_share([_answers(generator, (size,), more, gains)])


def _one_task(keep: float, gains: float) -> Draw:
    return lambda generator, size: _kept(generator, size, keep, gains)


def _two_tasks(keep: float, gains: float) -> Draw:
    """A quarter of the items is a harder task of the same weight."""

    def draw(generator: Generator, size: int) -> Interval | None:
        sizes = (size // 4, 0.5), (size - size // 4, 0.8)
        return kept_share([_answers(generator, (count,), keep, gains, right) for count, right in sizes])

    return draw


def _four_samples(keep: float) -> Draw:
    """Four answers to each prompt; prompts differ in how often they are right, and in what they lose."""

    def draw(generator: Generator, size: int) -> Interval | None:
        right = generator.beta(3, 1, (size, 1))
        loses = np.clip((1 - keep) * generator.gamma(1.0, 1.0, (size, 1)), 0, 1)
        dense = (generator.random((size, 4)) < right).astype(float)
        own = dense * (generator.random((size, 4)) >= loses)
        return kept_share([(dense.mean(axis=1), own.mean(axis=1))])

    return draw


def _loops(generator: Generator, size: int, more: float, gains: float) -> Interval:
    """Looping texts beyond the dense model's, of which `gains` loop only in the dense model."""
    draws = generator.random(size)
    dense = (draws < gains).astype(float)
    own = ((draws >= gains) & (draws < 2 * gains + more)).astype(float)
    return paired_difference(dense, own)


def _steps(generator: Generator, size: int, scale: float, spread: float) -> np.ndarray:
    """S(8) of each prompt: acceptance of tokens whose total variation is log-normal, by prompt and by token."""
    prompts = np.exp(spread * generator.standard_normal((size, 1)) - spread**2 / 2)
    tv = np.minimum(0.99, scale * prompts * np.exp(1.5 * generator.standard_normal((size, 8)) - 1.125))
    accepted = np.where(generator.random(tv.shape) < 0.5, 1, np.maximum(0, 1 - 2 * tv))
    return (np.prod(accepted[:, :-1], axis=1) * (1 - tv[:, -1]))[:, None]


def _survival(scale: float, spread: float) -> tuple[str, float, Draw]:
    truth = float(_steps(np.random.default_rng(99), 400_000, scale, spread).mean())

    def draw(generator: Generator, size: int) -> Interval:
        mean, low, high = (float(end[0]) for end in mean_curve(_steps(generator, size, scale, spread)))
        return Interval(mean, low, high)

    return f"{truth:.4f}, prompts spread {spread:g}", truth, draw


def _kl(prompts: float, tokens: float) -> tuple[str, float, Draw]:
    """Mean KL per token of texts of 8 to 64 tokens; both spreads are those of the logarithm."""

    def draw(generator: Generator, size: int) -> Interval:
        kl = np.exp(prompts * generator.standard_normal((size, 1)) + tokens * generator.standard_normal((size, 64)))
        lengths = generator.integers(8, 65, size)
        inside = np.arange(64) < lengths[:, None]
        return ratio_interval((kl * inside).sum(axis=1), lengths.astype(float))

    return f"spread {prompts:g} of prompts, {tokens:g} of tokens", float(np.exp((prompts**2 + tokens**2) / 2)), draw


def _name(keep: float, gains: float) -> str:
    return f"{100 * keep:g} %, {100 * gains:g} % gain"


SHARES = ((1.0, 0.0), (1.0, 0.02), (1.0, 0.05), (0.98, 0.02), (0.94, 0.0), (0.94, 0.04), (0.9, 0.02), (0.81, 0.0))
SHARES += ((0.81, 0.05), (0.7, 0.02), (0.4, 0.02))
RATES = ((0.0, 0.0), (0.0, 0.02), (0.06, 0.0), (0.06, 0.02), (0.15, 0.02), (0.24, 0.0), (0.4, 0.02))
KEEPS = ((1.0, 0.0), (1.0, 0.02), (1.0, 0.1), (0.98, 0.0), (0.98, 0.02), (0.95, 0.0), (0.95, 0.05), (0.9, 0.02))
KEEPS += ((0.9, 0.1), (0.8, 0.0), (0.8, 0.05))
CASES: dict[str, Sequence[tuple[str, float, Draw]]] = {
    "Share of right answers (exact)": [(f"{100 * p:g} %", p, _share(p)) for p in (0.5, 0.8, 0.9, 0.95, 0.98, 1.0)],
    "Paired difference (Tango)": [
        (f"{100 * lost:g} % lost, {100 * gained:g} % gained", gained - lost, _difference(lost, gained))
        for lost, gained in (
            (0, 0),
            (0.02, 0.02),
            (0.02, 0),
            (0.05, 0.05),
            (0.05, 0),
            (0.1, 0.1),
            (0.1, 0.02),
            (0.2, 0.05),
        )
    ],
    "Share kept, one task": [(_name(*one), one[0], _one_task(*one)) for one in KEEPS],
    "Share kept, two tasks, one of a quarter of the items": [(_name(*one), one[0], _two_tasks(*one)) for one in KEEPS],
    "Share kept, four samples a prompt": [(f"{100 * p:g} %", p, _four_samples(p)) for p in (1.0, 0.98, 0.95, 0.9)],
    "S(8)": [_survival(scale, spread) for spread in (0.5, 1.0) for scale in (0.0003, 0.003, 0.02, 0.1)],
    "KL per token": [_kl(*spreads) for spreads in ((0.3, 1.5), (0.5, 2.0), (0.8, 2.0), (1.2, 2.0))],
}


def _print(title: str, headings: Sequence[str], rows: Iterator[list[str]]) -> None:
    print(f"\n### {title}\n\n| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
