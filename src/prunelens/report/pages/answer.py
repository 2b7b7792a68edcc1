"""The answer table: one row of formatted cells and one sentence per compressed model, from the summary."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunelens.report.wording import DASH, count, interval, number, percent

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One cell: the number, and what belongs below it in small print."""

    main: str
    below: str = ""


@dataclass(frozen=True)
class Column:
    """One column of the answer table."""

    title: str
    definition: str
    cell: Callable[[Record], Cell]


def _saved(record: Record) -> Cell:
    return Cell(percent(record["parameters_saved"]), f"{number(record['parameters'] / 1e6)} M left")


def _bytes(record: Record) -> Cell:
    size = record["size"]
    zeros = f", {percent(size['zeros'])} zeros" if size["zeros"] > 0.01 else ""
    saved = percent(size["saved"]) if size["kl_per_percent"] is not None else "none"
    return Cell(saved, f"{number(size['bytes'] / 1e6)} MB left{zeros}")


def _per_byte(record: Record) -> Cell:
    found = record["size"]["kl_per_percent"]
    return Cell(DASH, "saves no bytes") if found is None else Cell(number(found))


def _kl_mean(record: Record) -> Cell:
    return Cell(number(record["kl"]["mean"]), interval(record["kl"]))


def _kl_tail(record: Record) -> Cell:
    return Cell(number(record["kl"]["p95"]), f"median {number(record['kl']['median'])}")


def _same_top1(record: Record) -> Cell:
    return Cell(percent(record["same_top1"]["mean"]), interval(record["same_top1"], percent))


def _survival(n: int) -> Callable[[Record], Cell]:
    def cell(record: Record) -> Cell:
        found = record["survival"].get(str(n))
        if found is None:
            return Cell(DASH, f"read {record['faithful_length']['horizon']} tokens")
        return Cell(percent(found["value"]), interval(found, percent))

    return cell


def _same_choice(record: Record) -> Cell:
    found = record["options"]
    return Cell(f"{found['same_choice']} of {found['prompts']}") if found else Cell(DASH, "no prompts with options")


def _excess(record: Record) -> Cell:
    found = record["excess_nll"]
    return Cell(number(found["mean"]), interval(found))


def _faithful(record: Record) -> Cell:
    found = record["faithful_length"]
    sign = "≥ " if found["beyond_horizon"] else ""
    return Cell(f"{sign}{found['median']}", f"of {found['horizon']} read")


def _expected(record: Record) -> Cell:
    expected = record["faithful_length"]["expected"]
    return Cell(number(expected["mean"]), interval(expected))


def _first_divergent(record: Record) -> Cell:
    found = record["first_divergent_token"]
    never = f"{found['never']} of {found['prompts']} never"
    if found["median"] is None:
        return Cell(f"none in {record['faithful_length']['horizon']}", never)
    return Cell(count(found["median"]), never)


COLUMNS = (
    Column(
        "Bytes saved",
        "Share of the bytes of the dense model's weights as they are stored. For a recipe what it still reads counts, "
        "for a checkpoint its files. The zeros of a mask are stored like other numbers, so a mask alone saves none.",
        _bytes,
    ),
    Column(
        "KL mean, nats",
        "KL(p‖p′) of the next-token probabilities, dense to compressed, mean over the tokens of the dense "
        "model's greedy texts, both models reading the same text. In brackets the 95 % interval "
        "over prompts.",
        _kl_mean,
    ),
    Column(
        "Same top-1",
        "Share of those tokens at which both models find the same token most likely.",
        _same_top1,
    ),
    Column(
        "S(8)",
        "Probability that both models write the same first 8 tokens when sampling, coupled as well as "
        "token-by-token coupling can be (S2). 95 % interval over prompts.",
        _survival(8),
    ),
    Column(
        "Same choice",
        "On prompts with options: how often both models choose the same one. Choosing among a few options says little "
        "of what happens over the whole vocabulary.",
        _same_choice,
    ),
    Column(
        "Faithful length, tokens",
        "The largest n with S(n) ≥ ½ (S4); ≥ N where S never falls below ½ within the N tokens read.",
        _faithful,
    ),
    Column(
        "First divergent token, greedy",
        "Both models write greedily from the prompt: position of the first different token, median over "
        "prompts, and on how many prompts the texts never diverge.",
        _first_divergent,
    ),
)
"""What answers first."""
MORE = (
    Column(
        "Parameters saved",
        "Share of the dense model's parameters that the compressed model does without.",
        _saved,
    ),
    Column(
        "KL per 1 % of bytes",
        "Mean KL divided by the bytes saved, in nats for each percent of the dense model's bytes: the damage per byte "
        "saved, by which the table is sorted. Models that save none come last, by their KL.",
        _per_byte,
    ),
    Column(
        "KL 95th pct, nats",
        "One token in twenty has a larger KL than this. Damage sits in few tokens, so the mean alone misleads.",
        _kl_tail,
    ),
    Column("S(32)", "The same as S(8) for the first 32 tokens.", _survival(32)),
    Column(
        "Expected agreed tokens",
        "Mean number of tokens before sampled texts diverge, Σ S(n) over the tokens read (S4).",
        _expected,
    ),
    Column(
        "Excess NLL, nats",
        "What the dense model needs for the compressed model's next token beyond its own, per token, on the dense "
        "model's sampled texts.",
        _excess,
    ),
)


def cells(record: Record, columns: Sequence[Column] = COLUMNS) -> list[Cell]:
    """The row of one compressed model, one cell per column."""
    return [column.cell(record) for column in columns]


ANCHORED = ("KL mean, nats", "Same top-1", "S(8)", "Faithful length, tokens", "S(32)")
"""Titles of the columns that anchors have a number for."""


def anchor_cells(record: Record, columns: Sequence[Column] = COLUMNS) -> list[Cell]:
    """The row of one anchor (A2)."""
    return [column.cell(record) if column.title in ANCHORED else Cell(DASH) for column in columns]


def sentence(record: Record, temperature: float) -> str:
    """What the numbers of one compressed model say, in plain words and nothing beyond them."""
    if record["kl"]["max"] <= 0:
        return "No difference was found: at every step both models give the same probabilities."
    same = record["same_top1"]["mean"]
    start = f"Reading the dense model's own text it picks the same token {percent(same)} of the time"
    return f"{start}{_sampled(record, temperature)}. {_greedy(record)}."


def _sampled(record: Record, temperature: float) -> str:
    found = record["faithful_length"]
    texts = "sampled texts" if temperature == 1 else f"texts sampled at temperature {temperature:g}"
    if found["beyond_horizon"]:
        return f", and at least half of the {texts} still agree after {found['horizon']} tokens"
    join = "yet" if record["same_top1"]["mean"] >= 0.5 else "and"
    after = f"{found['median'] + 1} tokens" if found["median"] else "the first token"
    return f", {join} fewer than half of the {texts} still agree after {after}"


def _greedy(record: Record) -> str:
    found = record["first_divergent_token"]
    if found["never"] == found["prompts"]:
        return f"Decoding greedily, no text diverges within {record['faithful_length']['horizon']} tokens"
    if found["median"] is None:
        return (
            f"Decoding greedily, {found['never']} of {found['prompts']} texts do not diverge within "
            f"{record['faithful_length']['horizon']} tokens"
        )
    return f"Decoding greedily, the texts diverge at token {count(found['median'])} in the median"


def checks(record: Record) -> str:
    """How far the forecasts agree with what was measured by running."""
    return f"{_greedy_check(record['greedy_check'])} {_coupling_check(record['coupling'])}"


def _greedy_check(found: Record) -> str:
    ties, unexplained = found["ties"], found["unexplained"]
    agree = found["prompts"] - len(ties) - len(unexplained)
    text = f"Writing diverges at the token at which reading forecasts it on {agree} of {found['prompts']} prompts"
    if not ties and not unexplained:
        return f"{text}."
    where = ", ".join(f"{item['prompt_id']} at token {item['step']}" for item in unexplained)
    named = f" ({where})" if where else ""
    return f"{text}; {len(ties)} differ by a rounding tie, {len(unexplained)} unexplained{named}."


def _coupling_check(found: Record) -> str:
    predicted = found["predicted"]
    inside = predicted["low"] <= found["measured"] <= predicted["high"]
    return (
        f"Simulated couplings: {number(found['measured'])} agreed tokens drawn, {number(predicted['mean'])} "
        f"{interval(predicted)} predicted, {'inside' if inside else 'outside'} the interval."
    )
