"""Every family that transformers knows, tiny: it opens and its numbers are right, or it is refused in a sentence."""

import functools
from typing import Any

import pytest
import torch

import oracle
from families import LISTED, build, known_families
from prunelens.errors import PrunelensError
from prunelens.models.loading import Model, quiet, wrap
from prunelens.models.surgery import Drop, dropped
from prunelens.tracing.generate import Greedy, write

NEW_TOKENS = 4


def names_of(model: Model, drop: Drop) -> list[str]:
    """The modules that compute what is dropped."""
    return [
        part.name
        for block in model.anatomy.blocks
        for part in block.sublayers
        if part.layer_idx in getattr(drop, part.kind) | drop.block
    ]


def drops_of(model: Model) -> list[Drop]:
    kinds = {kind: [part.layer_idx for part in model.anatomy.sublayers(kind)] for kind in ("attention", "mlp")}
    first = frozenset(kinds["attention"][:1])
    return [
        Drop(),
        Drop(attention=first, mlp=frozenset(kinds["mlp"][1:2])),
        Drop(block=frozenset([1]), attention=frozenset(kinds["attention"][-1:])),
    ]


@pytest.mark.parametrize("family", known_families())
def test_opens_with_right_numbers_or_is_refused(family: str) -> None:
    listed = LISTED[family]
    with quiet():
        if listed.startswith("not built"):
            with pytest.raises(Exception):  # noqa: B017, PT011
                build(family)
            return
        network = build(family)
        if listed != "opens":
            with pytest.raises(PrunelensError, match="expected"):
                wrap(network)
            return
        check(wrap(network))


def check(model: Model) -> None:
    """Dropped equals emptied by hand, in a whole pass and written with other prompts in the batch."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in (4, 9, 6, 9)]
    for drop in drops_of(model):
        expected_model = oracle.emptied(model.network, names_of(model, drop))
        with dropped(model.anatomy, drop):
            written = write(model, prompts, [Greedy() for _ in prompts], NEW_TOKENS, 4)
            with torch.inference_mode():
                logits = model.network(input_ids=torch.tensor([prompts[1]]), use_cache=False).logits
        with torch.inference_mode():
            expected = expected_model(input_ids=torch.tensor([prompts[1]]), use_cache=False).logits
        assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-3), drop
        for prompt, found in zip(prompts, written, strict=True):
            tokens, logits = oracle.written_alone(expected_model, prompt, NEW_TOKENS, model.eos_ids)
            own = model.head(found.states)
            assert torch.allclose(own, logits[: len(own)], rtol=1e-3, atol=1e-3 * float(logits.abs().max())), drop
            assert found.token_ids == tokens, drop
