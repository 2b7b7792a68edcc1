"""L4: decoding against growing prefixes, free running from the divergence on, draws of their own, the coupling."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import oracle
from conftest import tiny_model
from prunelens.metrics.head import Pair, stream_pairs
from prunelens.models.model import Model
from prunelens.models.surgery.drop import Drop, dropped
from prunelens.tracing.forced import Trajectory, forced_states
from prunelens.tracing.free import NUM_COUPLINGS, couple, first_other, write_dense, write_free
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


def read(
    model: Model, prompts: list[list[int]], texts: list[Continuation], drop: Drop
) -> list[dict[str, torch.Tensor]]:
    """Teacher-forced statistics of a dropped model on each text, at temperature 1."""
    read_texts = [
        Trajectory(row, "greedy", tuple(prompt), tuple(text.token_ids), text.ended)
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
    ]
    states, *dropped_states = forced_states(model, read_texts, [drop])
    tokens = torch.tensor([token for text in texts for token in text.token_ids])
    (stats,) = stream_pairs(states, model.head, [Pair(dropped_states[0], model.head)], tokens, 1.0)
    pieces = {name: value.split([len(text.token_ids) for text in texts]) for name, value in stats.items()}
    return [{name: pieces[name][row] for name in pieces} for row in range(len(texts))]


def known_steps(model: Model, prompts: list[list[int]], greedy: list[Continuation], drop: Drop) -> list[int]:
    return [
        first_other(text.token_ids, stats["top_ids_compressed"][:, 0], stats["same_top1"])
        for text, stats in zip(greedy, read(model, prompts, greedy, drop), strict=True)
    ]


def dense_and_coupled(model: Model, prompts: list[list[int]], batch_size: int, seed: int = 0, drop: Drop = DROP):
    greedy, draws = write_dense(model, prompts, 8, 1.0, seed, batch_size)
    known = known_steps(model, prompts, greedy, drop)
    with dropped(model.anatomy, drop):
        free = write_free(model, prompts, greedy, known, 8, batch_size)
    accepted = [stats["acceptance"].numpy() for stats in read(model, prompts, draws, drop)]
    return greedy, draws, free, couple(prompts, draws, accepted, 8, seed)


def many_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (1 + row % 5,), generator=generator).tolist() for row in range(count)]


@pytest.mark.parametrize("drop", [DROP, Drop(attention=frozenset([1])), Drop()], ids=["much", "little", "nothing"])
def test_texts_written_from_the_divergence_on_are_those_written_from_the_start(drop: Drop) -> None:
    """Among them texts that differ from their first token on, that never do, and that end."""
    model = tiny_model("llama", torch.float64)
    prompts = many_prompts(24)
    model.network.generation_config.eos_token_id = []
    ends = {text.token_ids[4] for text in write(model, prompts, [Greedy() for _ in prompts], 8, 32)[:4]}
    model.network.generation_config.eos_token_id = sorted(ends)
    greedy, _ = write_dense(model, prompts, 8, 1.0, 0, 32)
    known = known_steps(model, prompts, greedy, drop)
    passes: list[int] = []
    advanced: list[int] = []
    with dropped(model.anatomy, drop):
        handle = model.network.model.register_forward_hook(lambda *call: passes.append(len(call[2].last_hidden_state)))
        free = write_free(model, prompts, greedy, known, 8, 5, advanced.append)
        handle.remove()
        expected = write(model, prompts, [Greedy() for _ in prompts], 8, 32)
    for text, other, start, dense in zip(free, expected, known, greedy, strict=True):
        assert (text.token_ids, text.ended, text.start) == (other.token_ids, other.ended, start)
        assert torch.allclose(text.states, other.states[start:], rtol=1e-9, atol=1e-9)
        assert text.token_ids[:start] == dense.token_ids[:start]
        assert start == len(dense.token_ids) or text.token_ids[start] != dense.token_ids[start]
    assert sum(advanced) == 8 * len(prompts)
    whole = [start == len(text.token_ids) for start, text in zip(known, greedy, strict=True)]
    if drop == Drop():
        assert all(whole)
        assert not passes
    else:
        assert 0 in known
        assert any(text.ended for text in free)
        assert any(whole) or drop == DROP
        assert any(0 < start < len(text.token_ids) for start, text in zip(known, greedy, strict=True))


def test_what_only_rounding_decides_does_not_part_the_texts() -> None:
    own, tokens = torch.tensor([4, 5, 6, 7]), [4, 9, 6, 8]
    assert first_other(tokens, own, torch.tensor([True, True, True, True])) == 4
    assert first_other(tokens, own, torch.tensor([True, False, True, True])) == 1
    assert first_other(tokens, own, torch.tensor([False, True, False, False])) == 3
    assert first_other([], own[:0], torch.ones(0, dtype=torch.bool)) == 0


def test_texts_whose_positions_depend_on_their_length_are_written_from_the_prompt_on() -> None:
    """(They are read otherwise than they are written.)"""
    model = tiny_model("llama")
    manner = replace(model.anatomy.manner, alike_up_to=11)
    model.anatomy = replace(model.anatomy, manner=manner)
    prompts = [[5, 9, 33], [4, 90, 17, 60, 61]]
    greedy, _ = write_dense(model, prompts, 8, 1.0, 0, 4)
    free = write_free(model, prompts, greedy, [8, 8], 8, 4)
    assert [text.start for text in free] == [8, 0]
    assert [text.token_ids for text in free] == [text.token_ids for text in greedy]
    assert [len(text.states) for text in free] == [0, 8]


def test_batch_size_and_order_change_nothing() -> None:
    model = tiny_model("llama", torch.float64)
    greedy, draws, free, agreed = dense_and_coupled(model, PROMPTS, 32)
    order = [3, 0, 4, 2, 1]
    for batch_size in (1, 2, 32):
        again = dense_and_coupled(model, [PROMPTS[index] for index in order], batch_size)
        # prompts 0 and 4 are equal: each keeps the draws of its turn
        turns = sorted(range(5), key=lambda row: order[row])
        assert [again[0][row].token_ids for row in turns] == [text.token_ids for text in greedy]
        assert [again[1][row].token_ids for row in turns] == [own.token_ids for own in draws]
        assert [again[2][row].token_ids for row in turns] == [text.token_ids for text in free]
        assert [again[3][row] for row in turns] == agreed


def test_seed_and_repetition_change_the_draws() -> None:
    model = tiny_model("llama")
    _, draws, _, _ = dense_and_coupled(model, PROMPTS, 32)
    _, others, _, _ = dense_and_coupled(model, PROMPTS, 32, seed=1)
    assert draws[0].token_ids != draws[4].token_ids
    assert any(one.token_ids != two.token_ids for one, two in zip(draws, others, strict=True))
    assert (uniforms(0, "a", [1, 2], 0, 5) != uniforms(0, "b", [1, 2], 0, 5)).all()


def test_a_model_coupled_with_itself_never_parts() -> None:
    model = tiny_model("llama")
    greedy, _, free, agreed = dense_and_coupled(model, PROMPTS, 4, drop=Drop())
    assert agreed == [[8] * NUM_COUPLINGS] * len(PROMPTS)
    for one, other in zip(greedy, free, strict=True):
        assert one.token_ids == other.token_ids
        assert other.start == len(one.token_ids)


def test_couplings_are_those_of_a_run_token_by_token() -> None:
    """The same numbers decide as where each model's probabilities are asked for at every step."""
    model = tiny_model("llama", torch.float64)
    _, draws, _, agreed = dense_and_coupled(model, PROMPTS, 4, seed=3)
    zeroed = oracle.zeroed(model.network, attention=[1], mlp=[0])
    repeats = [0, 0, 0, 0, 1]
    for prompt, repeat, text, found in zip(PROMPTS, repeats, draws, agreed, strict=True):
        numbers = uniforms(3, "coupling", prompt, repeat, 8 * NUM_COUPLINGS).reshape(8, NUM_COUPLINGS)
        together, expected = np.ones(NUM_COUPLINGS, bool), np.zeros(NUM_COUPLINGS, int)
        for step, token in enumerate(text.token_ids):
            with torch.inference_mode():
                ids = torch.tensor([[*prompt, *text.token_ids[:step]]])
                own, dense = (torch.softmax(one(ids).logits[0, -1], -1)[token] for one in (zeroed, model.network))
            together &= numbers[step] * float(dense) < float(own)
            expected += together
        whole = len(text.token_ids)
        assert found == [8 if text.ended and length == whole else length for length in expected.tolist()]
    assert len({length for found in agreed for length in found}) > 3


def test_drawing_follows_the_weights() -> None:
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    numbers = torch.cat(
        [(torch.arange(4000, dtype=torch.float64) + 0.5) / 4000, torch.tensor([0.0, np.nextafter(1, 0)])]
    )
    found = draw(weights.expand(4002, -1), numbers).tolist()
    assert Counter(found[:4000]) == {1: 3000, 3: 1000}
    assert found[4000:] == [1, 3]


def test_sampled_tokens_have_the_models_distribution() -> None:
    """First tokens of many draws against p, within five standard deviations of each count."""
    model = tiny_model("llama")
    count = 3000
    with torch.inference_mode():
        p = torch.softmax(model.network(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / 0.8, -1).numpy()
    _, draws = write_dense(model, [PROMPTS[0]] * count, 1, 0.8, 0, 2000)
    seen = np.bincount([own.token_ids[0] for own in draws], minlength=97)
    assert (abs(seen - count * p) <= 5 * np.sqrt(count * p * (1 - p)) + 1).all()


def test_couplings_agree_as_often_as_predicted() -> None:
    """S3': the mean agreed length of many couplings against the oracle's own simulation and exact 1 - TV."""
    model = tiny_model("llama")
    count = 1000
    _, draws = write_dense(model, [PROMPTS[1]] * count, 3, 1.0, 0, 2000)
    prompts = [PROMPTS[1]] * count
    accepted = [stats["acceptance"].numpy() for stats in read(model, prompts, draws, DROP)]
    agreed = couple(prompts, draws, accepted, 3, 0)
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
    ended, cut = (Continuation([7, 2], torch.zeros(2, 4), end) for end in (True, False))
    always, never = np.ones(2), np.array([1.0, 0.0])
    found = couple([[1], [1], [1]], [ended, cut, ended], [always, always, never], 9, 0)
    assert found == [[9] * NUM_COUPLINGS, [2] * NUM_COUPLINGS, [1] * NUM_COUPLINGS]
