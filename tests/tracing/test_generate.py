"""Rows are decoded together only where that changes nothing, and never more than there are."""

import pytest
import torch

from conftest import tiny_model
from prunelens.models.batches import Batching
from prunelens.tracing.generate import Greedy, _group, write

PROMPTS = [[5] * length for length in (3, 9, 9, 3, 12)]


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


@pytest.mark.parametrize("batch_size", [5, 10**9, 10**18])
def test_a_batch_is_never_larger_than_its_rows(batch_size: int) -> None:
    model = tiny_model("llama")
    rows: list[int] = []
    handle = model.network.model.register_forward_hook(lambda *call: rows.append(len(call[2].last_hidden_state)))
    write(model, PROMPTS, [Greedy() for _ in PROMPTS], 2, batch_size)
    handle.remove()
    assert set(rows) == {5}


@pytest.mark.parametrize("family", ["gemma2", "bloom", "mpt", "llama"])
def test_float64_decodes_prompts_of_any_lengths(family: str) -> None:
    model = tiny_model(family, torch.float64)
    together = write(model, PROMPTS, [Greedy() for _ in PROMPTS], 4, 8)
    for prompt, found in zip(PROMPTS, together, strict=True):
        alone = write(model, [prompt], [Greedy()], 4, 1)[0]
        assert torch.isfinite(found.states).all()
        assert found.token_ids == alone.token_ids
        assert torch.allclose(found.states, alone.states, rtol=1e-4, atol=1e-4)
