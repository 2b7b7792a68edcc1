"""Free running that begins at the divergence gives what free running from the prompt gives, whatever the recipe."""

import numpy as np
import pytest
from test_compare import SETTINGS, texts

from conftest import tiny_model, tiny_network, tiny_tokenizer
from prunelens.api import compare
from prunelens.models.opening.loading import wrap
from prunelens.results import Comparison
from prunelens.study.compare import stages

RECIPES = ("drop-attention@1", "magnitude:0.2", "quantize:int8")
LABELS = ["compressed", "prompt_id", "trace", "step", "position", "token_id", "contexts_differ"]


def compared(seed: int) -> Comparison:
    return compare(tiny_model("llama", seed=seed), *RECIPES, prompts=texts(), seed=seed, **SETTINGS)


@pytest.fixture(scope="module", params=[0, 3])
def both(request: pytest.FixtureRequest) -> tuple[Comparison, Comparison, list[int]]:
    """(From the divergence on, from the prompt on, where the first one began)."""
    began: list[int] = []
    own = stages.first_other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "first_other", lambda *given: began.append(own(*given)) or began[-1])
        late = compared(request.param)
        patch.setattr(stages, "first_other", lambda *given: 0)
        return late, compared(request.param), began


def test_texts_and_agreed_counts_are_the_same(both: tuple[Comparison, Comparison, list[int]]) -> None:
    late, whole, began = both
    assert late.tables["continuations"].equals(whole.tables["continuations"])
    assert late.tables["survival"].equals(whole.tables["survival"])
    assert len(began) == len(RECIPES) * len(texts())
    assert len(set(began)) > 3
    assert {0, 9} & set(began)


def test_rows_are_the_same_within_rounding(both: tuple[Comparison, Comparison, list[int]]) -> None:
    late, whole, _ = both
    left, right = late.tables["steps"], whole.tables["steps"]
    assert left.select(LABELS).equals(right.select(LABELS))
    for name in ("hidden_cosine", "logit_cosine", "prob_cosine", "tv", "entropy_compressed", "entropy_dense"):
        pairs = [np.array(table[name].to_pylist(), dtype=float) for table in (left, right)]
        assert np.allclose(*pairs, atol=2e-5), name
    for name in ("kl_dense_compressed", "rank_of_dense_top1", "same_top1"):
        pairs = [np.array(table[name].to_pylist(), dtype=float) for table in (left, right)]
        assert np.allclose(*pairs, rtol=1e-3, atol=1e-5), name


def test_steps_in_the_same_context_are_those_that_were_read(both: tuple[Comparison, Comparison, list[int]]) -> None:
    steps = both[0].tables["steps"].to_pylist()
    read = {(row["compressed"], row["prompt_id"], row["step"]): row for row in steps if row["trace"] == "greedy"}
    shared = [row for row in steps if row["trace"] == "free" and not row["contexts_differ"]]
    assert shared
    for row in shared:
        assert row | {"trace": "greedy"} == read[row["compressed"], row["prompt_id"], row["step"]]


def test_a_model_against_itself_writes_nothing() -> None:
    dense, same = (wrap(tiny_network("llama"), tiny_tokenizer(), name) for name in ("dense", "same"))
    passes: list[int] = []
    handle = same.network.model.register_forward_hook(
        lambda module, args, given, output: passes.append(bool(given.get("use_cache"))), with_kwargs=True
    )
    compare(dense, same, prompts=texts(), **SETTINGS)
    handle.remove()
    assert passes
    assert not any(passes)
