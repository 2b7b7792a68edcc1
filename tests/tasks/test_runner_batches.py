"""Where others in a batch change a model's numbers, the harness and retrieval run one request at a time."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import text_model, tiny_model
from families import build
from prunelens.errors import PrunelensError
from prunelens.models.batches import Batching
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.variant import Variant
from prunelens.study.benchmark.record import SpeedSettings
from prunelens.study.benchmark.speed import check_lengths
from prunelens.tasks import runner
from prunelens.tasks.retrieval import embed
from prunelens.tracing.draft import write_assisted


def with_batching(model: Model, batching: Batching) -> Model:
    manner = replace(model.anatomy.manner, batching=batching)
    return replace(model, anatomy=replace(model.anatomy, manner=manner))


@pytest.mark.parametrize(
    ("batching", "expected"),
    [(Batching(), 40), (Batching(read_up_to=0), 1), (Batching(written_up_to=0), 1), (Batching(together=False), 1)],
)
def test_the_harness_runs_requests_alone(batching: Batching, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    own = runner._Runner.__init__

    def noted(self: Any, model: Model, batch_size: int, *others: Any) -> None:
        sizes.append(batch_size)
        own(self, model, batch_size, *others)

    monkeypatch.setattr(runner._Runner, "__init__", noted)
    runner.respond(with_batching(text_model(), batching), [], 40, lambda total: lambda done: None)
    assert sizes == [expected]


def test_the_harness_uses_no_cache_that_is_wrong() -> None:
    network = tiny_model("llama").network
    seen: list[bool] = []
    own = network.generate

    def generate(**settings: Any) -> Any:
        seen.append(settings["use_cache"])
        return own(**settings)

    network.generate = generate
    with runner._without_cache(network):
        network.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2, use_cache=True)
    network.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2, use_cache=True)
    assert seen == [False, True]


@pytest.mark.parametrize(("batching", "rows"), [(Batching(), 3), (Batching(read_up_to=0), 1)])
def test_retrieval_reads_texts_alone(batching: Batching, rows: int) -> None:
    model = with_batching(text_model(), batching)
    sizes: list[int] = []
    found = embed(model, ["a", "some words", "more"], advance=sizes.append)
    assert max(sizes) == rows
    assert np.allclose(found, embed(model, ["a", "some words", "more"], batch_size=1), atol=1e-5)


def test_what_needs_a_cache_is_refused_where_it_is_wrong() -> None:
    model = wrap(build("moshi"))
    with pytest.raises(PrunelensError, match=r"expected a cache .* leave it out of the benchmark"):
        check_lengths({"moshi": Variant(model)}, SpeedSettings(1, 4, 4, 1))
    with pytest.raises(PrunelensError, match=r"expected a cache .* leave out --draft"):
        write_assisted(model, model, [5, 6, 7], 4, 2, None, 0)
