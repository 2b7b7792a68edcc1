"""Continuations from a shared cache against whole passes, and where caches cannot be shared."""

from typing import Any

import pytest
import torch

from conftest import ALL_FAMILIES, text_model, tiny_network, tiny_tokenizer
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import Drop, dropped
from prunelens.tasks.harness import Asking, Harness
from prunelens.tasks.runner import _Runner
from prunelens.tasks.shared_prefix import LONG_PREFIX, continuation_answers, has_shared_start, shares_prefixes

SHARED = ["llama", "qwen3", "gpt2", "falcon alibi", "bloom", "mpt", "opt", "olmoe", "cohere", "granite", "gptj"]
START = tuple(range(3, 3 + LONG_PREFIX + 4))


def requests(start: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Contexts of several lengths, most of them with several continuations of several lengths, in no order."""
    contexts = [(*start, *own) for own in ((40,), (41, 42, 43), (44, 45, 46), (47, 48, 49, 50, 51), (52,))]
    conts = [(60,), (61, 62), (63, 64, 65, 66), (67, 68)]
    found = [(context, cont) for place, context in enumerate(contexts) for cont in conts[: 1 + place % 4]]
    return [found[index] for index in torch.randperm(len(found)).tolist()]


def oracle(network: Any, context: tuple[int, ...], cont: tuple[int, ...]) -> tuple[float, bool]:
    with torch.inference_mode():
        logits = network(input_ids=torch.tensor([context + cont])).logits[0, len(context) - 1 : -1].double()
    tokens = torch.tensor(cont)
    costs = torch.log_softmax(logits, dim=-1).gather(1, tokens[:, None])
    return float(costs.sum()), bool((logits.argmax(-1) == tokens).all())


def model_of(family: str) -> Model:
    return wrap(tiny_network(family), tiny_tokenizer(), name=family)


@pytest.mark.parametrize("start", [(), START])
@pytest.mark.parametrize("family", SHARED)
def test_answers_equal_whole_passes(family: str, start: tuple[int, ...]) -> None:
    model = model_of(family)
    assert shares_prefixes(model)
    asked = requests(start)
    greedy = (
        START,
        tuple(model.network.generate(torch.tensor([START]), max_new_tokens=2, do_sample=False)[0, -2:].tolist()),
    )
    asked += [greedy, (START, (greedy[1][0],))]
    told: dict[int, Any] = {}
    drop = Drop(attention=frozenset([1]), mlp=frozenset([2]))
    for rows, removed in ((1, Drop()), (3, Drop()), (40, drop)):
        with dropped(model.anatomy, removed):
            found = continuation_answers(
                model, asked, rows, lambda places, answers: told.update(zip(places, answers, strict=True))
            )
            expected = [oracle(model.network, *request) for request in asked]
        assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], rel=1e-5, abs=1e-5)
        assert [best for _, best in found] == [best for _, best in expected]
        assert [told[place] for place in range(len(asked))] == found
    assert oracle(model.network, *greedy)[1]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "qwen3_next", "lfm2", "mamba", "jamba", "falcon_h1"])
def test_windows_and_recurrent_states_are_not_shared(family: str) -> None:
    assert family in ALL_FAMILIES
    assert not shares_prefixes(model_of(family))


def test_what_is_worth_sharing() -> None:
    assert has_shared_start([((3, 4), (5,)), ((3, 4), (6,))])
    assert not has_shared_start([((3, 4), (5,)), ((4, 3), (5,))])
    assert has_shared_start([((*START, 40), (5,)), ((*START, 41), (5,))])
    assert not has_shared_start([((*START[:LONG_PREFIX], 40), (5,)), ((*START[: LONG_PREFIX - 1], 41), (5,))])
    assert not has_shared_start([(START, (5,))])


@pytest.mark.parametrize("name", ["core_choice", "core_letters"])
def test_the_harness_scores_are_the_ones_without_sharing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, harness = text_model(), Harness((name,))
    places = harness.items(name, limit=5)
    shared = harness.answer(model, name, Asking(places, batch_size=8), places)
    asked = harness._questions(model, name, Asking(places, batch_size=8))
    shared_answers = [request.resps for item in asked.chosen(places) for request in item.requests]
    monkeypatch.setattr("prunelens.tasks.runner.shares_prefixes", lambda model: False)
    alone = harness.answer(model, name, Asking(places, batch_size=8), places)
    answers = [request.resps for item in asked.chosen(places) for request in item.requests]
    assert harness.score(name, shared) == harness.score(name, alone)
    assert [one[0][0] for one in shared_answers] == pytest.approx([one[0][0] for one in answers], rel=1e-5)
    assert [one[0][1] for one in shared_answers] == [one[0][1] for one in answers]


def test_texts_without_a_context_and_long_ones_are_read_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any) -> Any:
        raise AssertionError("shared")

    monkeypatch.setattr("prunelens.tasks.runner.continuation_answers", forbidden)
    asked = _Runner(text_model(), 4, lambda total: lambda done: None, None)
    long = [3 + place % 90 for place in range(asked.max_length)]
    for requests in ([(None, [1], [4]), (None, [1], [5])], [(("a", "b"), long, [4]), (("a", "c"), long, [5])]):
        assert len(asked._loglikelihood_tokens(requests, disable_tqdm=True)) == 2
