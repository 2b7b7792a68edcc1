"""Speculative decoding: the greedy text is the dense model's own, and every count is what a run by hand gives."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from conftest import tiny_model
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.surgery.drop import Drop
from prunelens.models.surgery.variant import Variant
from prunelens.tracing.draft import draft_of, measure_draft, write_assisted, write_plain
from prunelens.tracing.draft_run import DraftedText, DraftRun, Round

PROMPT = [5, 6, 7, 8, 9]
LENGTH = 24
DROPS = {
    "nothing": Drop(),
    "first attention": Drop(attention=frozenset([0])),
    "last attention, an mlp": Drop(attention=frozenset([3]), mlp=frozenset([1])),
    "first block": Drop(block=frozenset([0])),
    "all attention": Drop(attention=frozenset(range(4))),
    "blocks and attention": Drop(attention=frozenset([0]), block=frozenset([1, 3])),
}


def greedy(variant: Variant, tokens: Sequence[int]) -> int:
    """The most likely next token, read without a cache."""
    with torch.inference_mode(), variant.running() as model:
        return int(model.network(torch.tensor([list(tokens)]), use_cache=False).logits[0, -1].argmax())


def by_hand(dense: Model, variant: Variant, num_drafted: int) -> tuple[list[int], list[list[int]], int, int]:
    """(text, what was drafted in each round, accepted, examined) of greedy speculative decoding."""
    text: list[int] = []
    rounds, accepted, examined = [], 0, 0
    while len(text) < LENGTH:
        drafted: list[int] = []
        for _ in range(min(num_drafted, LENGTH - len(text) - 1)):
            drafted.append(greedy(variant, [*PROMPT, *text, *drafted]))
        for token in drafted:
            examined += 1
            own = greedy(Variant(dense), [*PROMPT, *text])
            text.append(own)
            if own != token:
                break
            accepted += 1
        else:
            text.append(greedy(Variant(dense), [*PROMPT, *text]))
        if drafted:
            rounds.append(drafted)
    return text, rounds, accepted, examined


def assisted(dense: Model, variant: Variant, num_drafted: int = 4) -> DraftedText:
    draft = draft_of(variant, dense)
    return write_assisted(dense, draft, PROMPT, LENGTH, num_drafted, None, 0)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("name", DROPS)
def test_the_greedy_text_and_all_counts_are_those_of_a_run_by_hand(family: str, name: str) -> None:
    dense = tiny_model(family)
    dense.network.generation_config.eos_token_id = []
    variant = Variant(dense, DROPS[name])
    text, rounds, accepted, examined = by_hand(dense, variant, 4)
    found = assisted(dense, variant)
    assert write_plain(dense, PROMPT, LENGTH, None, 0).token_ids == tuple(text)
    assert found.token_ids == tuple(text)
    assert [list(each.token_ids) for each in found.rounds] == rounds
    assert (found.accepted, found.examined) == (accepted, examined)
    assert found.dense_calls == len(text) - accepted


def test_a_model_of_its_own_drafts_as_it_is() -> None:
    dense, other = tiny_model(), tiny_model(seed=1)
    dense.network.generation_config.eos_token_id = []
    assert draft_of(Variant(other), dense) is other
    settings = other.network.generation_config
    text, rounds, accepted, examined = by_hand(dense, Variant(other), 3)
    found = assisted(dense, Variant(other), num_drafted=3)
    assert (list(found.token_ids), found.accepted, found.examined) == (text, accepted, examined)
    assert [list(each.token_ids) for each in found.rounds] == rounds
    assert other.network.generation_config is settings
    assert "generate" not in vars(other.network)


@pytest.mark.parametrize("num_drafted", [1, 4, 7])
def test_a_model_that_drafts_for_itself_is_always_accepted(num_drafted: int) -> None:
    dense = tiny_model()
    run = measure_draft(dense, Variant(dense), [PROMPT, [9, 10]], LENGTH, num_drafted, 1.0, 0)
    assert run.acceptance == 1
    assert run.accepted == run.examined > 0
    for text in run.assisted:
        assert text.dense_calls == -(-len(text.token_ids) // (num_drafted + 1))


def test_texts_end_where_the_dense_model_ends_them() -> None:
    dense = tiny_model("mistral")
    alone = write_plain(dense, PROMPT, LENGTH, None, 0)
    assert len(alone.token_ids) < LENGTH
    assert alone.token_ids[-1] in dense.eos_ids
    for drop in DROPS.values():
        found = assisted(dense, Variant(dense, drop))
        assert found.token_ids == alone.token_ids
        assert found.dense_calls + found.accepted >= len(alone.token_ids)


def test_the_checkpoint_says_where_texts_end_and_nothing_else() -> None:
    dense = tiny_model("mistral")
    whole = write_plain(dense, PROMPT, LENGTH, None, 0).token_ids
    dense.network.generation_config.eos_token_id = [2, whole[5]]
    dense.network.generation_config.repetition_penalty = 9.0
    ended = whole[: whole.index(whole[5]) + 1]
    assert write_plain(dense, PROMPT, LENGTH, None, 0).token_ids == ended
    assert assisted(dense, Variant(dense, DROPS["first block"])).token_ids == ended


def test_tokens_are_drawn_from_the_whole_vocabulary_at_the_temperature() -> None:
    dense = tiny_model()
    dense.network.generation_config.eos_token_id = []
    draft = draft_of(Variant(dense, Drop(attention=frozenset([1]))), dense)
    cold = write_plain(dense, PROMPT, LENGTH, None, 0).token_ids
    assert write_plain(dense, PROMPT, LENGTH, 1e-5, 0).token_ids == cold
    assert write_assisted(dense, draft, PROMPT, LENGTH, 4, 1e-5, 0).token_ids == cold
    for hot in (
        write_plain(dense, PROMPT, LENGTH, 100.0, 0),
        write_assisted(dense, draft, PROMPT, LENGTH, 4, 100.0, 0),
    ):
        with torch.inference_mode():
            logits = dense.network(torch.tensor([[*PROMPT, *hot.token_ids]])).logits[0, len(PROMPT) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(hot.token_ids)[:, None])
        ranks = (logits > chosen).sum(dim=1)
        assert (ranks >= 50).any()
        assert (ranks < 50).any()


def test_drawn_tokens_are_accepted_as_often_as_total_variation_says() -> None:
    dense = tiny_model()
    dense.network.generation_config.eos_token_id = []
    variant = Variant(dense, Drop(mlp=frozenset([2])))
    run = measure_draft(dense, variant, [PROMPT] * 24, 32, 4, 1.0, 0)
    shares = []
    for text in run.assisted:
        ids = torch.tensor([[*PROMPT, *text.token_ids]])
        with torch.inference_mode():
            p = dense.network(ids).logits[0].softmax(-1)
            with variant.running() as model:
                q = model.network(ids).logits[0].softmax(-1)
        for each in text.rounds:
            same = itertools.takewhile(
                lambda pair: pair[0] == pair[1], zip(text.token_ids[each.start :], each.token_ids, strict=False)
            )
            judged = min(len(list(same)) + 1, len(each.token_ids))
            rows = range(len(PROMPT) - 1 + each.start, len(PROMPT) - 1 + each.start + judged)
            shares += [float(torch.minimum(p[row], q[row]).sum()) for row in rows]
    assert len(shares) == run.examined
    expected = sum(shares) / len(shares)
    deviation = sum(share * (1 - share) for share in shares) ** 0.5 / len(shares)
    assert run.acceptance == pytest.approx(expected, abs=4 * deviation)
    assert deviation < 0.03


def test_the_seed_decides_and_nothing_of_the_caller_changes() -> None:
    dense = tiny_model()
    settings = dense.network.generation_config
    variant = Variant(dense, Drop(attention=frozenset([0]), block=frozenset([2])))
    state = torch.random.get_rng_state()
    done: list[int] = []
    runs = [measure_draft(dense, variant, [PROMPT, PROMPT], LENGTH, 4, 1.0, seed, done.append) for seed in (0, 0, 5)]
    assert torch.equal(torch.random.get_rng_state(), state)
    texts = [[text.token_ids for text in (*run.plain, *run.assisted)] for run in runs]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]
    assert sum(done) == 3 * 2 * 2 * LENGTH
    assert dense.network.generation_config is settings
    assert all("forward" not in vars(module) for module in dense.network.modules())
    assert "generate" not in vars(dense.network)
    assert all(weight.numel() for weight in dense.network.parameters())


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "jamba"])
def test_a_recurrent_state_cannot_be_put_back(family: str) -> None:
    dense = tiny_model(family)
    settings = dense.network.generation_config
    with pytest.raises(PrunelensError, match=f"cannot run tiny-{family} with this draft .*stateful models.*--draft"):
        measure_draft(dense, Variant(dense), [PROMPT], 4, 4, 1.0, 0)
    assert dense.network.generation_config is settings


def test_one_token_needs_no_draft() -> None:
    run = measure_draft(tiny_model(), Variant(tiny_model(seed=1)), [PROMPT], 1, 4, 1.0, 0)
    assert (run.acceptance, run.examined, run.cost_ratio, run.check_ratio) == (None, 0, None, None)
    assert run.tokens_per_dense_call == 1
    assert run.speedup > 0


TEXT = (11, 12, 13, 14, 15, 16, 17)


@pytest.mark.parametrize(
    ("drafted", "accepted", "examined"),
    [
        ([(0, (11, 12, 13, 14))], 4, 4),
        ([(0, (11, 12, 99, 14))], 2, 3),
        ([(0, (99, 12, 13, 14))], 0, 1),
        ([(0, (11, 99)), (2, (13, 14, 15))], 4, 5),
        ([(5, (16, 17, 99, 99))], 2, 2),
        ([(5, (16, 98, 99))], 1, 2),
        ([], 0, 0),
    ],
)
def test_judged_tokens_are_counted(drafted: list[tuple[int, tuple[int, ...]]], accepted: int, examined: int) -> None:
    rounds = tuple(Round(start, tokens, 1.0) for start, tokens in drafted)
    text = DraftedText(TEXT, 1.0, 0.5, 3, rounds)
    assert (text.accepted, text.examined) == (accepted, examined)


def test_times_become_ratios() -> None:
    """A dense token takes 2 s, a drafted one 1 s, judging 3 s; reading the prompt is no part of that."""
    plain = DraftedText(TEXT, 10 + 6 * 2.0, 10.0, 7)
    rounds = (Round(0, (11, 12, 13), 9.0), Round(3, (14, 99, 98), 3.0), Round(5, (16,), 1.0))
    text = DraftedText(TEXT, 20 + 3 + 1 + 2 * 3.0, 20.0, 3, rounds)
    run = DraftRun((plain, plain), (text, DraftedText(TEXT, 44.0, 20.0, 3, rounds)), 3)
    assert run.cost_ratio == pytest.approx(0.5)
    assert run.check_ratio == pytest.approx((6 + 20) / 4 / 2)
    assert run.tokens_per_dense_call == pytest.approx(7 / 3)
    assert run.plain_tokens_per_second == pytest.approx(7 / 22)
    assert run.assisted_tokens_per_second == pytest.approx(14 / 74)
    assert run.speedup == pytest.approx(44 / 74)
    assert run.speedup_range == (pytest.approx(22 / 44), pytest.approx(22 / 30))
