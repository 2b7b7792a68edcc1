"""L4: cached batched decoding against growing prefixes, draws that depend on the prompt alone, and the coupling."""

from collections import Counter

import numpy as np
import pytest
import torch

import oracle
from conftest import tiny_model
from prunelens.models.model import Model
from prunelens.models.surgery.drop import Drop, dropped
from prunelens.tracing.free import NUM_COUPLINGS, Coupled, SampledText, _count_end, write_coupled, write_dense
from prunelens.tracing.generate import Continuation, Greedy, draw, uniforms, write

PROMPTS = [[5, 9, 33], [4, 90, 17, 60, 61], [20], [88, 12, 40, 41, 42, 43, 7], [5, 9, 33]]
DROP = Drop(attention=frozenset([1]), mlp=frozenset([0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_equals_growing_prefixes(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    found = write(model, PROMPTS, [Greedy() for _ in PROMPTS], 8, batch_size=3)
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        assert continuation.token_ids == oracle.greedy(model.network, prompt, 8, model.eos_ids)
        assert continuation.ended == (continuation.token_ids[-1] in model.eos_ids)
        assert continuation.states.shape == (len(continuation.token_ids), 32)
        rows = oracle.step_rows(model.network, model.network, prompt, continuation.token_ids, 1.0)
        assert all(row["same_top1"] for row in rows)


def test_states_are_those_that_enter_the_head() -> None:
    model = tiny_model("llama", torch.float64)
    (found,) = write(model, [PROMPTS[1]], [Greedy()], 6, batch_size=1)
    assert found.token_ids
    for step, token in enumerate(found.token_ids):
        prefix = torch.tensor([PROMPTS[1] + found.token_ids[:step]])
        logits = model.network(prefix).logits[0, -1]
        assert torch.allclose(model.head(found.states[step : step + 1])[0], logits, rtol=1e-10, atol=1e-10)
        assert int(logits.argmax()) == token


def test_stops_at_eos() -> None:
    model = tiny_model("llama")
    texts = write(model, PROMPTS, [Greedy() for _ in PROMPTS], 12, batch_size=8)
    eos = texts[1].token_ids[3]
    model.network.generation_config.eos_token_id = [eos, 2]
    found = write(model, PROMPTS, [Greedy() for _ in PROMPTS], 12, batch_size=8)
    for before, after in zip(texts, found, strict=True):
        stop = next((at + 1 for at, token in enumerate(before.token_ids) if token in (eos, 2)), 12)
        assert after.token_ids == before.token_ids[:stop]
        assert after.ended == (after.token_ids[-1] in (eos, 2))
        assert len(after.states) == stop
    assert any(continuation.ended for continuation in found)


def test_the_checkpoints_own_generation_settings_are_not_used() -> None:
    model = tiny_model("llama")
    expected = write(model, PROMPTS, [Greedy() for _ in PROMPTS], 8, batch_size=8)
    own = model.network.generation_config
    own.repetition_penalty, own.do_sample, own.top_k, own.min_new_tokens, own.num_beams = 1.8, True, 3, 8, 2
    found = write(model, PROMPTS, [Greedy() for _ in PROMPTS], 8, batch_size=8)
    assert [text.token_ids for text in found] == [text.token_ids for text in expected]
    assert model.network.generation_config is own


def dense_and_coupled(model: Model, prompts: list[list[int]], batch_size: int, seed: int = 0):
    greedy, draws = write_dense(model, prompts, 8, 1.0, seed, batch_size)
    with dropped(model.anatomy, DROP):
        free, agreed = write_coupled(model, prompts, draws, 8, 1.0, seed, batch_size)
    return greedy, draws, free, agreed


def test_batch_size_and_order_change_nothing() -> None:
    model = tiny_model("llama", torch.float64)
    greedy, draws, free, agreed = dense_and_coupled(model, PROMPTS, 32)
    order = [3, 0, 4, 2, 1]
    for batch_size in (1, 2, 32):
        again = dense_and_coupled(model, [PROMPTS[index] for index in order], batch_size)
        # prompts 0 and 4 are equal: each keeps the draws of its turn
        turns = sorted(range(5), key=lambda row: order[row])
        assert [again[0][row].token_ids for row in turns] == [text.token_ids for text in greedy]
        assert [again[1][row].continuation.token_ids for row in turns] == [own.continuation.token_ids for own in draws]
        assert [again[2][row].token_ids for row in turns] == [text.token_ids for text in free]
        assert [again[3][row] for row in turns] == agreed


def test_seed_and_repetition_change_the_draws() -> None:
    model = tiny_model("llama")
    _, draws, _, _ = dense_and_coupled(model, PROMPTS, 32)
    _, others, _, _ = dense_and_coupled(model, PROMPTS, 32, seed=1)
    assert draws[0].continuation.token_ids != draws[4].continuation.token_ids
    assert any(one.continuation.token_ids != two.continuation.token_ids for one, two in zip(draws, others, strict=True))
    assert (uniforms(0, "a", [1, 2], 0, 5) != uniforms(0, "b", [1, 2], 0, 5)).all()


def test_a_model_coupled_with_itself_never_parts() -> None:
    model = tiny_model("llama")
    greedy, draws = write_dense(model, PROMPTS, 8, 0.7, 0, 4)
    free, agreed = write_coupled(model, PROMPTS, draws, 8, 0.7, 0, 4)
    assert agreed == [[8] * NUM_COUPLINGS] * len(PROMPTS)
    for one, other in zip(greedy, free, strict=True):
        assert one.token_ids == other.token_ids
        assert torch.equal(one.states, other.states)


def test_drawing_follows_the_weights() -> None:
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    counts = Counter(draw(weights, float(number)) for number in (np.arange(4000) + 0.5) / 4000)
    assert counts == {1: 3000, 3: 1000}
    assert draw(weights, 0.0) == 1
    assert draw(weights, np.nextafter(1, 0)) == 3


def test_sampled_tokens_have_the_models_distribution() -> None:
    """First tokens of many draws against p, within five standard deviations of each count."""
    model = tiny_model("llama")
    count = 3000
    with torch.inference_mode():
        p = torch.softmax(model.network(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 0.8, -1).numpy()
    _, draws = write_dense(model, [PROMPTS[0]] * count, 1, 0.8, 0, 2000)
    seen = np.bincount([own.continuation.token_ids[0] for own in draws], minlength=97)
    assert (abs(seen - count * p) <= 5 * np.sqrt(count * p * (1 - p)) + 1).all()
    assert draws[0].probs[0] == pytest.approx(p[draws[0].continuation.token_ids[0]], rel=1e-5)


def test_couplings_agree_as_often_as_predicted() -> None:
    """S3': the mean agreed length of many couplings against the oracle's own simulation and exact 1 - TV."""
    model = tiny_model("llama")
    count = 1000
    _, draws = write_dense(model, [PROMPTS[1]] * count, 3, 1.0, 0, 2000)
    with dropped(model.anatomy, DROP):
        _, agreed = write_coupled(model, [PROMPTS[1]] * count, draws, 3, 1.0, 0, 2000)
    found = np.array(agreed)
    assert found.shape == (count, NUM_COUPLINGS)
    zeroed = oracle.zeroed(model.network, attention=[1], mlp=[0])
    expected = oracle.simulate_coupling(
        model.network, zeroed, PROMPTS[1], 3, 1.0, np.random.default_rng(0), model.eos_ids, 2000
    )
    spread = np.sqrt(np.var(found.mean(1)) / count + np.var(expected) / 2000)
    assert abs(found.mean() - np.mean(expected)) <= 4 * spread
    (row,) = oracle.step_rows(model.network, zeroed, PROMPTS[1], [5], 1.0)
    first = (found >= 1).mean(1)
    assert abs(first.mean() - (1 - row["tv"])) <= 4 * first.std() / np.sqrt(count)
    assert len({tuple(lengths) for lengths in agreed}) > 10


def test_an_agreed_end_counts_to_the_horizon() -> None:
    dense = SampledText(Continuation([7, 2], torch.zeros(2, 4), True), [0.5, 0.5])
    assert _count_end([0, 1, 2], dense.continuation, 9) == [0, 1, 9]
    rule = Coupled(dense, np.array([[0.1, 0.95], [0.1, 0.1]]), 1.0)
    logits = torch.log(torch.tensor([0.05, 0.1, 0.4, 0.0, 0.0, 0.0, 0.0, 0.45]) + 1e-12)
    assert rule.choose(0, logits) == 7
    assert not rule.finished
    assert rule.choose(1, logits) == 2
    assert rule.finished
    assert rule.agreed.tolist() == [2, 0]
