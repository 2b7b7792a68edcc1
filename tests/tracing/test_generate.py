"""Rows are written as transformers' own loop writes them, in batches that change nothing, and leave when they end."""

from typing import Any

import numpy as np
import pytest
import torch

import generate_oracle
from conftest import shared_network, tiny_model
from families import build
from generate_oracle import choose_best, choose_drawn
from prunelens.models.anatomy.hooks import decoder_of
from prunelens.models.batches import Batching
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.tracing.generate import Greedy, Rule, Sampled, _group, draw, softmax, uniforms, write

PROMPTS = [[5] * length for length in (3, 9, 9, 3, 12)]
OTHERS = [[5, 9, 33], [4, 90, 17, 60, 61], [20], [88, 12, 40, 41, 42, 43, 7], [5, 9, 33], [30, 31]]


@pytest.mark.parametrize(
    ("batching", "groups"),
    [
        (Batching(), [[4, 1, 2, 0, 3]]),
        (Batching(written_up_to=0), [[4], [1, 2], [0, 3]]),
        (Batching(written_up_to=13), [[4], [1, 2, 0, 3]]),
        (Batching(written_up_to=12), [[4], [1, 2], [0, 3]]),
        (Batching(together=False), [[4], [1], [2], [0], [3]]),
    ],
)
def test_rows_that_change_one_another_are_decoded_apart(batching: Batching, groups: list[list[int]]) -> None:
    assert _group(PROMPTS, max_new_tokens=4, batch_size=8, batching=batching) == groups


def test_equal_prompts_stand_side_by_side() -> None:
    prompts = [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert _group(prompts, 4, 2, Batching()) == [[0, 2], [1, 3]]


def rows_run(model: Model) -> tuple[list[int], Any]:
    """(How many rows each pass of the decoder has, filled from now on; its hook)."""
    rows: list[int] = []
    decoder = decoder_of(model.network)
    return rows, decoder.register_forward_hook(lambda *call: rows.append(len(call[2].last_hidden_state)))


@pytest.mark.parametrize("batch_size", [5, 10**9, 10**18])
def test_a_batch_is_never_larger_than_its_rows_and_reads_a_prompt_once(batch_size: int) -> None:
    model = tiny_model("llama")
    rows, handle = rows_run(model)
    write(model, PROMPTS, [Greedy() for _ in PROMPTS], 2, batch_size)
    handle.remove()
    assert rows == [3, 5]


@pytest.mark.parametrize("family", ["gemma2", "bloom", "mpt", "llama"])
def test_float64_decodes_prompts_of_any_lengths(family: str) -> None:
    model = tiny_model(family, torch.float64)
    together = write(model, PROMPTS, [Greedy() for _ in PROMPTS], 4, 8)
    for prompt, found in zip(PROMPTS, together, strict=True):
        alone = write(model, [prompt], [Greedy()], 4, 1)[0]
        assert torch.isfinite(found.states).all()
        assert found.token_ids == alone.token_ids
        assert torch.allclose(found.states, alone.states, rtol=1e-4, atol=1e-4)


def with_ends(model: Model, steps: int) -> set[int]:
    """Make two tokens that the model writes early, and in two texts, ends of a text; (those tokens)."""
    model.network.generation_config.eos_token_id = []
    written = write(model, OTHERS, [Greedy() for _ in OTHERS], steps, 8)
    ends = {written[1].token_ids[2], written[3].token_ids[4]}
    model.network.generation_config.eos_token_id = sorted(ends)
    return ends


def assert_as_transformers_writes(model: Model, steps: int = 9) -> None:
    ends = with_ends(model, steps)
    numbers = [uniforms(0, "sample", prompt, row, steps) for row, prompt in enumerate(OTHERS)]
    prompts = [prompt for prompt in OTHERS for _ in range(2)]
    rules: list[Rule] = [rule for own in numbers for rule in (Greedy(), Sampled(own, 0.8))]
    chosen = [choose for own in numbers for choose in (choose_best, choose_drawn(own, 0.8))]
    expected = generate_oracle.generate(model.network, decoder_of(model.network), prompts, chosen, steps, ends)
    for batch_size in (1, 5, 12):
        found = write(model, prompts, rules, steps, batch_size)
        for own, (tokens, states) in zip(found, expected, strict=True):
            assert own.token_ids == tokens
            assert own.ended == (tokens[-1] in ends)
            assert torch.allclose(own.states, states, rtol=1e-4, atol=1e-4 * float(states.abs().max()))
    assert len({len(tokens) for tokens, _ in expected}) > 1


def test_texts_are_those_of_transformers_own_loop(any_family: str) -> None:
    """Recurrent states, convolutions, latents and windows among them."""
    model = tiny_model(any_family)
    assert model.anatomy.manner.moves
    assert_as_transformers_writes(model)


def test_draws_of_a_batch_are_those_of_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(40, 1000, generator=generator)
    numbers = np.random.default_rng(0).random(40)
    found = draw(softmax(logits, 0.7), torch.from_numpy(numbers))
    expected = [choose_drawn(numbers[row : row + 1], 0.7)(0, logits[row]) for row in range(40)]
    assert found.tolist() == expected
    assert len(set(expected)) > 30


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_many_sampled_rows_are_drawn_a_few_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    rules: list[Rule] = [Sampled(uniforms(0, "a", prompt, row, 5), 1.0) for row, prompt in enumerate(OTHERS)]
    expected = [text.token_ids for text in write(model, OTHERS, rules, 5, 8)]
    monkeypatch.setattr("prunelens.tracing.generate.rows_per_pass", lambda logits: at_once)
    assert [text.token_ids for text in write(model, OTHERS, rules, 5, 8)] == expected


def test_the_lowest_id_wins_a_tie() -> None:
    network = shared_network("llama")
    model = wrap(network)
    weight = torch.zeros_like(network.lm_head.weight)
    weight[[7, 30, 90]] = network.lm_head.weight[7].clone()
    weight[[12, 40]] = -weight[7]
    own = network.lm_head.weight
    network.lm_head.weight = torch.nn.Parameter(weight)
    try:
        found = write(model, OTHERS, [Greedy() for _ in OTHERS], 4, 8)
    finally:
        network.lm_head.weight = own
    assert {token for text in found for token in text.token_ids} <= {7, 12}


def test_rows_leave_when_enough_have_ended() -> None:
    model = tiny_model("llama")
    rows, handle = rows_run(model)
    limits = [6, 1, 2, 2, 4, 6]
    advanced: list[int] = []
    found = write(model, OTHERS, [Greedy() for _ in OTHERS], limits, 8, advanced.append)
    handle.remove()
    assert [len(text.token_ids) for text in found] == limits
    assert rows == [5, 6, 3, 3, 2, 2]  # five of six go on together: one that has ended is not worth a copy
    assert sum(advanced) == sum(limits)
    assert advanced[0] == 6
    for prompt, limit, text in zip(OTHERS, limits, found, strict=True):
        alone = write(model, [prompt], [Greedy()], limit, 1)[0]
        assert text.token_ids == alone.token_ids
        assert torch.allclose(text.states, alone.states, atol=1e-5)


def test_ended_texts_count_as_finished() -> None:
    model = tiny_model("llama")
    with_ends(model, 9)
    advanced: list[int] = []
    found = write(model, OTHERS, [Greedy() for _ in OTHERS], 9, 8, advanced.append)
    assert sum(advanced) == 9 * len(OTHERS)
    assert any(text.ended and len(text.token_ids) < 9 for text in found)


@pytest.mark.parametrize("family", ["xlstm", "recurrent_gemma", "moshi"])
def test_rows_stay_where_a_family_keeps_their_past_to_itself(family: str) -> None:
    model = wrap(build(family))
    assert not model.anatomy.manner.moves
    limits = [1, 4, 2]
    prompts = [[5, 9, 33], [4, 90, 17], [5, 9, 33]]
    rows, handle = rows_run(model)
    found = write(model, prompts, [Greedy() for _ in prompts], limits, 8)
    handle.remove()
    assert rows == [3] * 4
    for prompt, limit, text in zip(prompts, limits, found, strict=True):
        assert text.token_ids == write(model, [prompt], [Greedy()], limit, 1)[0].token_ids
        assert len(text.states) == limit


@pytest.mark.parametrize("sampled", [False, True])
def test_nothing_is_copied_to_the_host_row_by_row(sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each such copy would make a GPU wait."""
    model = tiny_model("llama")
    calls: list[str] = []
    for name in ("tolist", "item", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, _own=own, _name=name: calls.append(_name) or _own(self)
        )
    counts = []
    for prompts in ([[5, 9]], [[5, 9], [4, 90], [17, 60], [61, 20], [30, 31]]):
        calls.clear()
        rules: list[Rule] = [Sampled(np.full(4, 0.5), 1.0) if sampled else Greedy() for _ in prompts]
        write(model, prompts, rules, 4, 8)
        counts.append(len(calls))
        assert calls.count("tolist") == 4
    assert counts[0] == counts[1]
