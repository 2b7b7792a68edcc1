"""Long texts: what a model writes, what the dense model makes of it in float64, and the metrics of core_long."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import oracle
from conftest import tiny_model, words
from prunelens.metrics import head
from prunelens.metrics.head import token_nll
from prunelens.metrics.repetition import distinct_share, is_loop
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.variant import Variant
from prunelens.study.evaluate.scores import score_rows
from prunelens.tasks.encoding import encode
from prunelens.tasks.prompts import Prompt, PromptText
from prunelens.tasks.suite import MetricScores
from prunelens.tracing.long_texts import LongText, score_long, write_long

ASKED = [[5, 9, 33], [4, 90, 17, 60, 61], [20], [88, 12, 40, 41, 42, 43, 7]]
LIMIT = 20
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


def written(model: Model, variant: Variant, limit: int = LIMIT) -> list[LongText]:
    return write_long(model, variant, asked(model), limit, 3)


def generated(network: Any, prompt: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """What transformers writes greedily, one prompt at a time."""
    config = GenerationConfig(max_new_tokens=LIMIT, do_sample=False, eos_token_id=list(eos_ids), pad_token_id=0)
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        found = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return found[0, len(prompt) :].tolist()


def nll(network: Any, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Nats per token of a text after a prompt, from one pass of the network in float64."""
    with torch.inference_mode():
        logits = copy.deepcopy(network).double()(torch.tensor([[*prompt, *tokens]])).logits[0]
    logs = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return float(-sum(logs[step, token] for step, token in enumerate(tokens)) / len(tokens))


def by_name(found: Sequence[MetricScores]) -> dict[str, dict[str, float]]:
    return {scored.metric.name: scored.values for scored in found}


# --------------------------------------------------------------------------- writing and reading


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("family", FEW)
def test_the_dense_model_reads_its_own_text(family: str, dtype: torch.dtype, relative: float) -> None:
    model = tiny_model(family, dtype)
    for text in written(model, Variant(model)):
        assert text.nll_dense == pytest.approx(nll(model.network, text.prompt.token_ids, text.token_ids), rel=relative)


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("drop", DROPS)
def test_a_dropped_variant_writes_like_zeroed_weights(family: str, drop: Drop) -> None:
    """The variant writes, and the whole dense model reads."""
    model = ending(tiny_model(family, torch.float64), 33)
    zeroed = oracle.zeroed(model.network, drop.attention, drop.mlp, drop.block)
    texts = written(model, Variant(model, drop))
    assert [text.prompt.prompt_id for text in texts] == ["p0", "p1", "p2", "p3"]
    for text, prompt in zip(texts, ASKED, strict=True):
        assert list(text.token_ids) == generated(zeroed, prompt, [33, 2])
        expected = nll(model.network, prompt, text.token_ids)
        assert text.nll_dense == pytest.approx(expected, rel=1e-9)
        assert nll(zeroed, prompt, text.token_ids) < expected - 0.01  # it is not the writer that reads
    # nothing stays out of the model
    again = written(model, Variant(model))
    assert [list(text.token_ids) for text in again] == [generated(model.network, prompt, [33, 2]) for prompt in ASKED]


def test_a_model_with_weights_of_its_own() -> None:
    dense, other = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64, seed=1)
    for text, prompt in zip(written(dense, Variant(other)), ASKED, strict=True):
        assert list(text.token_ids) == generated(other.network, prompt, [2])
        assert text.nll_dense == pytest.approx(nll(dense.network, prompt, text.token_ids), rel=1e-9)


def test_ends_and_texts() -> None:
    model = tiny_model("llama", torch.float64)
    first = written(model, Variant(model))[0].token_ids
    texts = written(ending(model, first[4]), Variant(model))
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
    assert text.nll_dense == pytest.approx(nll(model.network, ASKED[0], [first]), rel=1e-9)


def test_the_dense_model_beside_itself_differs_nowhere() -> None:
    model = tiny_model("llama")
    once, twice = (score_long(model, written(model, Variant(model))) for _ in range(2))
    rows = score_rows(once, twice)
    assert {row["metric"] for row in rows} == {"nll_dense", "loops", "cut_by_limit", "distinct_3", "length"}
    for row in rows:
        assert row["difference"]["mean"] == 0
        assert row["difference"]["low"] < 0 < row["difference"]["high"]  # one text tells little
        assert row["dense"] == row["compressed"]


def test_batches_change_nothing_but_the_count_of_steps() -> None:
    model = tiny_model("llama", torch.float64)
    steps: dict[int, list[int]] = {}
    found = []
    for batch_size in (1, 2, 32):
        seen = steps.setdefault(batch_size, [])
        texts = write_long(model, Variant(model, DROPS[0]), asked(model), LIMIT, batch_size, seen.append)
        found.append([text.token_ids for text in texts])
        assert [text.nll_dense for text in texts] == pytest.approx(
            [nll(model.network, text.prompt.token_ids, text.token_ids) for text in texts], rel=1e-9
        )
    assert found[0] == found[1] == found[2]
    assert sum(steps[1]) == sum(map(len, found[0]))


# --------------------------------------------------------------------------- metrics


def made(token_ids: Sequence[int], prompt_id: str = "p", text: str = "", ended: bool = False) -> LongText:
    prompt = Prompt(prompt_id, "story", "asked", (5, 9))
    return LongText(prompt, tuple(token_ids), text, ended, 0.5 + len(token_ids))


def test_metrics_of_each_text() -> None:
    model = tiny_model("llama")
    texts = [made(range(3, 63), "new", ended=True), made([7] * 60, "loop"), made([3, 4], "short", ended=True)]
    found = by_name(score_long(model, texts))
    assert found == {
        "nll_dense": {"new": 60.5, "loop": 60.5, "short": 2.5},
        "loops": {"new": 0, "loop": 1, "short": 0},
        "cut_by_limit": {"new": 0, "loop": 1, "short": 0},
        "distinct_3": {"new": 1, "loop": 1 / 58},  # no 3-gram in a text of two tokens
        "length": {"new": 60, "loop": 60, "short": 2},
    }


def test_metrics_of_what_was_written() -> None:
    model = tiny_model("llama", torch.float64)
    texts = written(model, Variant(model, DROPS[0]), 60)
    found = by_name(score_long(model, texts))
    for text in texts:
        name = text.prompt.prompt_id
        assert found["nll_dense"][name] == text.nll_dense
        assert found["loops"][name] == is_loop(text.token_ids)
        assert found["distinct_3"][name] == distinct_share(text.token_ids, 3)
        assert found["cut_by_limit"][name] == (len(text.token_ids) == 60)


def test_what_decides_and_in_which_direction() -> None:
    model = tiny_model("llama")
    model.tokenizer.chat_template = "<think>"
    metrics = {scored.metric.name: scored.metric for scored in score_long(model, [made([3, 4, 5])])}
    assert {metric.task for metric in metrics.values()} == {"core_long"}
    assert {metric.use for metric in metrics.values()} == {"long-generation"}
    assert {name: metric.decides for name, metric in metrics.items() if metric.decides} == {
        "nll_dense": "nll",
        "loops": "loops",
    }
    assert {name for name, metric in metrics.items() if metric.better == "lower"} == {
        "nll_dense",
        "loops",
        "unclosed_thinking",
    }


# --------------------------------------------------------------------------- thinking


class Thinking:
    """A tokenizer whose chat template knows thinking, and whose every prompt is one text."""

    chat_template = "{% if think %}<think>{% endif %}"

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt

    def decode(self, token_ids: Sequence[int]) -> str:
        assert tuple(token_ids) == (5, 9)
        return self.prompt


def unclosed(prompt: str, text: str) -> float:
    model = wrap(tiny_model("llama").network, Thinking(prompt))
    return by_name(score_long(model, [made([3, 4, 5], text=text)]))["unclosed_thinking"]["p"]


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
    ],
)
def test_unclosed_thinking(prompt: str, text: str, expected: int) -> None:
    assert unclosed(prompt, text) == expected


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("ask <think>", "<think> so </think> an answer", 0),  # begun twice, closed in the end
        ("ask", "so </think> and <think> and so on", 1),  # closed without a beginning, then begun
    ],
)
def test_thinking_that_is_not_in_pairs(prompt: str, text: str, expected: int) -> None:
    assert unclosed(prompt, text) == expected


@pytest.mark.parametrize("template", [None, "{{ messages }}", "</think>"])
def test_without_a_word_of_thinking_there_is_no_such_metric(template: str | None) -> None:
    model = tiny_model("llama")
    model.tokenizer.chat_template = template
    text = made([3, 4, 5], text="<think> and so on")
    assert "unclosed_thinking" not in by_name(score_long(model, [text]))


# --------------------------------------------------------------------------- the head


def setup(rows: int = 23, num_tokens: int = 101, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    weight = torch.randn(num_tokens, 16, dtype=torch.float64).to(dtype)
    states = torch.randn(rows, 16, dtype=torch.float64).to(dtype)
    return weight, states, torch.randint(0, num_tokens, (rows,))


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_nll_against_sums_of_exponentials(dtype: torch.dtype, temperature: float) -> None:
    weight, states, tokens = setup(dtype=dtype)
    found = token_nll(states, lambda chunk: chunk @ weight.T, tokens, temperature)
    assert found.dtype == torch.float64
    logits = (states @ weight.T).double() / temperature  # rounded by the head, and nowhere else
    assert found.shape == (23,)
    for row, token in enumerate(tokens.tolist()):
        expected = torch.log(torch.exp(logits[row] - logits[row, token]).sum())
        assert found[row].item() == pytest.approx(expected.item(), rel=1e-10)


def test_token_nll_of_certain_and_impossible_tokens() -> None:
    logits = torch.tensor([[1000.0, 0.0], [1000.0, 0.0], [0.0, 0.0]])
    found = token_nll(logits, lambda chunk: chunk, torch.tensor([0, 1, 1]))
    assert found.tolist() == pytest.approx([0, 1000, float(torch.log(torch.tensor(2.0, dtype=torch.float64)))])


@pytest.mark.parametrize("chunk", [1, 101 * 2 - 1, 101 * 5, 101 * 23, 101 * 1000])
def test_chunks_equal_the_whole(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    weight, states, tokens = setup()
    sizes: list[int] = []

    def counted(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows @ weight.T

    whole = token_nll(states, counted, tokens, 0.7)
    sizes.clear()
    monkeypatch.setattr(head, "CPU_LOGITS_PER_CHUNK", chunk)
    found = token_nll(states, counted, tokens, 0.7)
    assert torch.allclose(found, whole, rtol=1e-12, atol=0)
    assert max(sizes) <= max(1, chunk // 101)
    assert sum(sizes[1:]) == len(states)  # the first row asks for the size of the vocabulary


def test_token_nll_of_nothing() -> None:
    weight, states, tokens = setup(rows=0)
    assert token_nll(states, lambda chunk: chunk @ weight.T, tokens).tolist() == []


def test_token_nll_of_a_model_is_its_own() -> None:
    model = tiny_model("gpt2", torch.float64)
    ids = torch.tensor([ASKED[3]])
    with torch.inference_mode():
        output = model.network(ids, output_hidden_states=True)
    found = token_nll(output.hidden_states[-1][0, :-1], model.head, ids[0, 1:])
    assert float(found.mean()) == pytest.approx(nll(model.network, ASKED[3][:1], ASKED[3][1:]), rel=1e-9)
    assert found.dtype == torch.float64
