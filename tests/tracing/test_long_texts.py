"""Long texts: what a model draws, and what the dense model makes of it in float64."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from conftest import tiny_model, words
from prunelens.metrics import head
from prunelens.metrics.head import token_costs
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.variant import Variant
from prunelens.tasks.encoding import encode
from prunelens.tasks.prompts import Prompt, PromptText
from prunelens.tracing.long_texts import LongPlan, LongText, write_long
from prunelens.tracing.sampling import Sampling

ASKED = [[5, 9, 33], [4, 90, 17, 60, 61], [20], [88, 12, 40, 41, 42, 43, 7]]
LIMIT = 20
PLAN = LongPlan(max_new_tokens=LIMIT, seed=3)
FEW = ["llama", "gpt2", "mistral", "qwen3"]
DROPS = [Drop(attention=frozenset([1])), Drop(mlp=frozenset([0, 3])), Drop(block=frozenset([2]))]


def asked(model: Model) -> list[Prompt]:
    texts = [
        PromptText(f"p{row}", "story", ({"role": "user", "content": words(*ids)},)) for row, ids in enumerate(ASKED)
    ]
    return encode(texts, model, False, LIMIT)


def ending(model: Model, token: int) -> Model:
    """The model with one more token that ends a text."""
    model.network.generation_config.eos_token_id = [token, 2]
    return model


def written(model: Model, variant: Variant, plan: LongPlan = PLAN) -> list[LongText]:
    return write_long(model, variant, asked(model), plan, 3)


def logits_of(network: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Logits behind each token, from one pass of the network in float64."""
    with torch.inference_mode():
        return copy.deepcopy(network).double()(torch.tensor([list(tokens)])).logits[0]


def drawn(network: Any, prompt: Sequence[int], numbers: np.ndarray, eos_ids: Sequence[int]) -> list[int]:
    """A text at T = 1, every token from a pass of its own: the first whose cumulated probability exceeds the number."""
    found: list[int] = []
    for number in numbers:
        probs = torch.softmax(logits_of(network, [*prompt, *found])[-1], dim=-1).tolist()
        total, token = probs[0], 0
        while total <= number:
            token += 1
            total += probs[token]
        found.append(token)
        if token in eos_ids:
            break
    return found


def read(network: Any, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[float, float]:
    """(-log p, entropy of p) of a text after a prompt, nats per token, by sums over the vocabulary."""
    logits = logits_of(network, [*prompt, *tokens])[len(prompt) - 1 : -1]
    cost = entropy = 0.0
    for row, token in zip(logits, tokens, strict=True):
        probs = torch.exp(row) / torch.exp(row).sum()
        cost -= float(torch.log(probs[token]))
        entropy -= sum(prob * float(np.log(prob)) for prob in probs.tolist() if prob > 0)
    return cost / len(tokens), entropy / len(tokens)


# --------------------------------------------------------------------------- writing and reading


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("family", FEW)
def test_the_dense_model_reads_its_own_text(family: str, dtype: torch.dtype, relative: float) -> None:
    model = tiny_model(family, dtype)
    for text, prompt in zip(written(model, Variant(model)), ASKED, strict=True):
        cost, entropy = read(model.network, prompt, text.token_ids)
        assert text.nll_dense == pytest.approx(cost, rel=relative)
        assert text.entropy_dense == pytest.approx(entropy, rel=relative)
        assert text.excess_nll == pytest.approx(cost - entropy, rel=relative, abs=relative)


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("drop", DROPS)
def test_a_dropped_variant_writes_like_zeroed_weights(family: str, drop: Drop) -> None:
    """The variant writes, and the whole dense model reads."""
    model = ending(tiny_model(family, torch.float64), 33)
    zeroed = oracle.zeroed(model.network, drop.attention, drop.mlp, drop.block)
    texts = written(model, Variant(model, drop))
    assert [text.prompt_id for text in texts] == ["p0", "p1", "p2", "p3"]
    for text, prompt in zip(texts, asked(model), strict=True):
        numbers = PLAN.numbers(Sampling(), prompt, 0)
        assert list(text.token_ids) == drawn(zeroed, prompt.token_ids, numbers, [33, 2])
        assert (text.nll_dense, text.entropy_dense) == pytest.approx(
            read(model.network, prompt.token_ids, text.token_ids), rel=1e-9
        )
        assert text.nll_dense != pytest.approx(read(zeroed, prompt.token_ids, text.token_ids)[0], abs=1e-3)
    # nothing stays out of the model
    again = written(model, Variant(model))[0]
    assert list(again.token_ids) == drawn(
        model.network, ASKED[0], PLAN.numbers(Sampling(), asked(model)[0], 0), [33, 2]
    )


def test_a_model_with_weights_of_its_own() -> None:
    dense, other = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64, seed=1)
    for text, prompt in zip(written(dense, Variant(other)), asked(dense), strict=True):
        numbers = PLAN.numbers(Sampling(), prompt, 0)
        assert list(text.token_ids) == drawn(other.network, prompt.token_ids, numbers, [2])
        assert text.nll_dense == pytest.approx(read(dense.network, prompt.token_ids, text.token_ids)[0], rel=1e-9)


def test_the_dense_model_expects_its_own_texts() -> None:
    """Drawn at T = 1, -log p is its entropy on average, whatever the prompt and wherever the text ends (V3)."""
    model = ending(tiny_model("llama"), 33)
    plan = replace(PLAN, samples=100)
    texts = written(model, Variant(model), plan)
    gaps = np.array([text.excess_nll * len(text.token_ids) for text in texts])
    assert len({len(text.token_ids) for text in texts}) > 5
    assert abs(gaps.mean()) < 4 * gaps.std() / len(gaps) ** 0.5
    sharp = written(model, Variant(model), replace(plan, samplings=(Sampling("own", {"temperature": 0.5}),)))
    assert np.mean([text.excess_nll for text in sharp]) < -0.01  # drawn otherwise it is not


def test_ends_and_texts() -> None:
    model = tiny_model("llama", torch.float64)
    first = written(model, Variant(model))[0].token_ids
    texts = written(ending(model, first[4]), Variant(model), replace(PLAN, samples=4))
    assert {text.ended for text in texts} == {True, False}
    for text in texts:
        kept = text.token_ids[:-1] if text.ended else text.token_ids
        assert text.text == " ".join({0: "<pad>", 1: "<bos>"}.get(token, f"w{token}") for token in kept)
        assert text.ended == (text.token_ids[-1] in (first[4], 2))
        assert text.ended or len(text.token_ids) == LIMIT
        assert not {first[4], 2} & set(kept)
    assert texts[0].token_ids == first[: first.index(first[4]) + 1]


def test_the_end_is_read_too() -> None:
    """A text of the end alone: its only token is what the dense model reads."""
    model = tiny_model("llama", torch.float64)
    first = written(model, Variant(model))[0].token_ids[0]
    text = written(ending(model, first), Variant(model))[0]
    assert (text.token_ids, text.text, text.ended) == ((first,), "", True)
    assert text.nll_dense == pytest.approx(read(model.network, ASKED[0], [first])[0], rel=1e-9)


def test_batches_change_nothing() -> None:
    model = tiny_model("llama", torch.float64)
    steps: dict[int, list[int]] = {}
    found = []
    for batch_size in (1, 2, 32):
        seen = steps.setdefault(batch_size, [])
        texts = write_long(model, Variant(model, DROPS[0]), asked(model), PLAN, batch_size, seen.append)
        found.append([text.token_ids for text in texts])
        assert [text.nll_dense for text in texts] == pytest.approx(
            [read(model.network, prompt, text.token_ids)[0] for text, prompt in zip(texts, ASKED, strict=True)],
            rel=1e-9,
        )
    assert found[0] == found[1] == found[2]
    assert {sum(seen) for seen in steps.values()} == {len(found[0]) * PLAN.max_new_tokens}  # an early end counts whole


# --------------------------------------------------------------------------- plans


def test_several_texts_of_each_prompt_in_each_way() -> None:
    model = tiny_model("llama", torch.float64)
    plan = replace(PLAN, samplings=(Sampling(), Sampling("own", {"top_k": 1})), samples=2)
    texts = written(model, Variant(model), plan)
    ways = [(way, repeat) for way in ("plain", "own") for repeat in (0, 1)]
    assert [(text.prompt_id, text.sampling, text.repeat) for text in texts] == [
        (f"p{row}", way, repeat) for row in range(len(ASKED)) for way, repeat in ways
    ]
    assert len(texts) == len(ASKED) * plan.per_prompt
    for plain, other, own, twin in (texts[row : row + 4] for row in range(0, len(texts), 4)):
        assert plain.token_ids != other.token_ids
        assert own.token_ids == twin.token_ids  # only one token is left each time
    alone = written(model, Variant(model))
    assert [text.token_ids for text in texts[::4]] == [text.token_ids for text in alone]


def test_numbers_are_shared_by_models_and_by_nothing_else() -> None:
    model = tiny_model("llama")
    first, second = asked(model)[:2]
    base = PLAN.numbers(Sampling(), first, 0)
    assert base.shape == (LIMIT,)
    assert (base == PLAN.numbers(Sampling(), first, 0)).all()
    others = [
        PLAN.null.numbers(Sampling(), first, 0),
        PLAN.numbers(Sampling("own", {"top_k": 3}), first, 0),
        PLAN.numbers(Sampling(), second, 0),
        PLAN.numbers(Sampling(), first, 1),
        replace(PLAN, seed=4).numbers(Sampling(), first, 0),
    ]
    for numbers in others:
        assert not np.isin(numbers, base).any()
    shorter = replace(PLAN, max_new_tokens=7).numbers(Sampling(), first, 0)
    assert (shorter == base[:7]).all()


def test_a_model_beside_itself_writes_the_same_and_with_other_numbers_something_else() -> None:
    model = tiny_model("llama")
    once, twice = (written(model, Variant(model)) for _ in range(2))
    assert once == twice
    for own, null in zip(once, written(model, Variant(model), PLAN.null), strict=True):
        assert own.prompt_id == null.prompt_id
        assert own.token_ids != null.token_ids


def test_texts_can_be_stored() -> None:
    model = tiny_model("llama")
    for text in written(model, Variant(model)):
        row = json.loads(json.dumps(asdict(text)))
        assert LongText(**row | {"token_ids": tuple(row["token_ids"])}) == text


# --------------------------------------------------------------------------- thinking


class Thinking:
    """A tokenizer whose chat template knows thinking; the prompt is one text, and so is what follows."""

    def __init__(self, prompt: str, text: str, template: str | None = "{% if think %}<think>{% endif %}") -> None:
        self.texts = {(5, 9): prompt}
        self.text = text
        self.chat_template = template

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.texts.get(tuple(token_ids), self.text)


def unclosed(tokenizer: Thinking) -> bool | None:
    model = wrap(tiny_model("llama").network, tokenizer)
    prompt = Prompt("p", "story", "asked", (5, 9))
    return write_long(model, Variant(model), [prompt], replace(PLAN, max_new_tokens=3), 1)[0].unclosed


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("ask", "an answer", 0),
        ("ask", "<think> so </think> an answer", 0),
        ("ask", "<think> and so on", 1),
        ("ask", "<think> so </think> an answer <think> again", 1),
        ("ask", "<think> so </think> and <think> again </think> done", 0),
        ("ask <think>", "so </think> an answer", 0),
        ("ask <think>\n", "and so on", 1),
        ("ask <think>", "", 1),
        ("ask <think>", "so </think> and <think> again", 1),
        ("ask <think>\n\n</think>\n\n", "an answer", 0),
        ("ask <think>\n\n</think>\n\n", "<think> and so on", 1),
        ("<think> old </think> ask <think>", "so </think> an answer", 0),
        ("<think> old </think> ask <think>", "and so on", 1),
        ("<think> old </think> ask", "an answer", 0),
        ("ask", "an answer </think> without a beginning", 0),
        ("ask <think>", "<think> so </think> an answer", 0),  # begun twice, closed in the end
        ("ask", "so </think> and <think> and so on", 1),  # closed without a beginning, then begun
    ],
)
def test_unclosed_thinking(prompt: str, text: str, expected: bool) -> None:
    assert unclosed(Thinking(prompt, text)) is bool(expected)


@pytest.mark.parametrize("template", [None, "{{ messages }}", "</think>"])
def test_without_a_word_of_thinking_nothing_is_said_of_it(template: str | None) -> None:
    assert unclosed(Thinking("ask", "<think> and so on", template)) is None


# --------------------------------------------------------------------------- the head


def setup(rows: int = 23, num_tokens: int = 101, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    weight = torch.randn(num_tokens, 16, dtype=torch.float64).to(dtype)
    states = torch.randn(rows, 16, dtype=torch.float64).to(dtype)
    return weight, states, torch.randint(0, num_tokens, (rows,))


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_costs_against_sums_of_exponentials(dtype: torch.dtype, temperature: float) -> None:
    weight, states, tokens = setup(dtype=dtype)
    found, entropies = token_costs(states, lambda chunk: chunk @ weight.T, tokens, temperature)
    assert found.dtype == entropies.dtype == torch.float64
    logits = (states @ weight.T).double() / temperature  # rounded by the head, and nowhere else
    assert found.shape == (23,)
    for row, token in enumerate(tokens.tolist()):
        expected = torch.log(torch.exp(logits[row] - logits[row, token]).sum())
        assert found[row].item() == pytest.approx(expected.item(), rel=1e-10)
        probs = torch.exp(logits[row]) / torch.exp(logits[row]).sum()
        assert entropies[row].item() == pytest.approx(-(probs * torch.log(probs)).sum().item(), rel=1e-9)


def test_token_costs_of_certain_and_impossible_tokens() -> None:
    logits = torch.tensor([[1000.0, 0.0], [1000.0, 0.0], [0.0, 0.0]])
    found, entropies = token_costs(logits, lambda chunk: chunk, torch.tensor([0, 1, 1]))
    assert found.tolist() == pytest.approx([0, 1000, np.log(2)])
    assert entropies.tolist() == pytest.approx([0, 0, np.log(2)])
    ruled_out = torch.tensor([[0.0, -torch.inf, 0.0]])
    assert token_costs(ruled_out, lambda chunk: chunk, torch.tensor([1]))[0].tolist() == [torch.inf]
    assert token_costs(ruled_out, lambda chunk: chunk, torch.tensor([0]))[1].tolist() == pytest.approx([np.log(2)])


@pytest.mark.parametrize("chunk", [1, 101 * 2 - 1, 101 * 5, 101 * 23, 101 * 1000])
def test_chunks_equal_the_whole(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    weight, states, tokens = setup()
    sizes: list[int] = []

    def counted(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows @ weight.T

    whole = token_costs(states, counted, tokens, 0.7)
    sizes.clear()
    monkeypatch.setattr(head, "CPU_LOGITS_PER_CHUNK", chunk)
    found = token_costs(states, counted, tokens, 0.7)
    for one, other in zip(found, whole, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=0)
    assert max(sizes) <= max(1, chunk // 101)
    assert sum(sizes[1:]) == len(states)  # the first row asks for the size of the vocabulary


def test_token_costs_of_nothing() -> None:
    weight, states, tokens = setup(rows=0)
    assert [found.tolist() for found in token_costs(states, lambda chunk: chunk @ weight.T, tokens)] == [[], []]


def test_token_costs_of_a_model_is_its_own() -> None:
    model = tiny_model("gpt2", torch.float64)
    ids = torch.tensor([ASKED[3]])
    with torch.inference_mode():
        output = model.network(ids, output_hidden_states=True)
    found = token_costs(output.hidden_states[-1][0, :-1], model.head, ids[0, 1:])
    expected = read(model.network, ASKED[3][:1], ASKED[3][1:])
    assert [float(one.mean()) for one in found] == pytest.approx(expected, rel=1e-9)
