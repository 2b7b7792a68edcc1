"""Every family that transformers knows, tiny: it opens and its numbers are right, or it is refused in a sentence."""

from contextlib import suppress

import pytest
import torch

import oracle
from families import build, known_families, listed
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import quiet, wrap
from prunelens.models.surgery.drop import Drop, dropped
from prunelens.tracing.generate import Greedy, write

LIMITS = (1, 4, 4, 2, 3)  # so that rows leave the batch


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


LISTED = listed()


def test_the_page_lists_every_family() -> None:
    assert list(LISTED) == known_families()
    assert set(LISTED.values()) == {"opens", "refused", "not built"}


@pytest.mark.families
@pytest.mark.parametrize("family", [family for family, word in LISTED.items() if word == "opens"])
def test_an_opened_family_has_right_numbers(family: str) -> None:
    with quiet():
        check(wrap(build(family)))


@pytest.mark.families
@pytest.mark.parametrize("family", [family for family, word in LISTED.items() if word == "refused"])
def test_a_refused_family_is_refused_in_a_sentence(family: str) -> None:
    sentence = r"\(family .*\): expected .*, found|could not be used as a causal language model: "
    with quiet(), pytest.raises(PrunelensError, match=sentence):
        wrap(build(family))


@pytest.mark.families
@pytest.mark.parametrize("family", [family for family, word in LISTED.items() if word == "not built"])
def test_a_family_that_is_not_built_here_ends_in_no_traceback_elsewhere(family: str) -> None:
    with quiet():
        try:
            network = build(family)
        except Exception as fault:
            pytest.skip(f"{type(fault).__name__}: {fault}"[:200])
        with suppress(PrunelensError):
            wrap(network)


def check(model: Model) -> None:
    """Dropped equals emptied by hand, in a whole pass and written with other prompts, and one twice, in the batch."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in (4, 9, 6, 9)]
    prompts.append(prompts[1])
    for drop in drops_of(model):
        expected_model = oracle.emptied(model.network, names_of(model, drop))
        with dropped(model.anatomy, drop):
            written = write(model, prompts, [Greedy() for _ in prompts], LIMITS, len(prompts))
            with torch.inference_mode():
                logits = model.network(input_ids=torch.tensor([prompts[1]]), use_cache=False).logits
        with torch.inference_mode():
            expected = expected_model(input_ids=torch.tensor([prompts[1]]), use_cache=False).logits
        assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-3), drop
        for prompt, limit, found in zip(prompts, LIMITS, written, strict=True):
            tokens, logits = oracle.written_alone(expected_model, prompt, limit, model.eos_ids)
            own = model.head(found.states)
            assert torch.allclose(own, logits[: len(own)], rtol=1e-3, atol=1e-3 * float(logits.abs().max())), drop
            assert found.token_ids == tokens, drop
