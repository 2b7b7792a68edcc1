"""Ways to draw texts: a checkpoint's own settings against transformers' own processors, and settings it refuses."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from conftest import tiny_model
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.tracing.generate import Sampled, write
from prunelens.tracing.sampling import OWN, PLAIN, Sampling, samplings

PROMPTS = [[5, 9, 33, 5, 9], [4, 90, 17]]
STEPS = 24


def with_settings(**settings: Any) -> Model:
    model = tiny_model("llama", torch.float64)
    model.network.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0, **settings)
    return model


def naive(model: Model, prompt: list[int], numbers: np.ndarray, settings: dict[str, Any]) -> list[int]:
    """Token by token, with the processors that transformers makes of the settings."""
    network = copy.deepcopy(model.network)
    config = GenerationConfig(do_sample=True, eos_token_id=2, **settings)
    processors = network._get_logits_processor(generation_config=config, input_ids_seq_length=len(prompt))
    found: list[int] = []
    for number in numbers:
        ids = torch.tensor([prompt + found])
        with torch.inference_mode():
            scores = processors(ids, network(ids).logits[:, -1].float())[0]
        chances = torch.softmax(scores.double(), dim=-1)
        token = int((torch.cumsum(chances, 0) > number).nonzero()[0, 0])
        found.append(token)
        if token == 2:
            break
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.4},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.4},
        {"typical_p": 0.5},
        {"epsilon_cutoff": 0.009},
        {"eta_cutoff": 0.02},
        {"repetition_penalty": 1.7, "top_k": 9},
        {"no_repeat_ngram_size": 1, "top_k": 4},
        {"top_p": 0.9, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05},
    ],
)
def test_own_settings_are_those_of_transformers(settings: dict[str, Any]) -> None:
    model = with_settings(do_sample=True, **settings)
    plain, own = samplings(model)
    assert (plain, own.name) == (Sampling(), OWN)
    assert dict(own.settings) == settings
    numbers = [np.random.default_rng(row).random(STEPS) for row in range(len(PROMPTS))]
    rules = [own.rule(one, prompt) for one, prompt in zip(numbers, PROMPTS, strict=True)]
    found = [text.token_ids for text in write(model, PROMPTS, rules, STEPS, 2)]
    assert found == [naive(model, prompt, one, settings) for prompt, one in zip(PROMPTS, numbers, strict=True)]
    drawn = [plain.rule(one, prompt) for one, prompt in zip(numbers, PROMPTS, strict=True)]
    assert found != [text.token_ids for text in write(model, PROMPTS, drawn, STEPS, 2)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
        {"max_new_tokens": 7, "num_beams": 3},
    ],
)
def test_settings_that_change_nothing_are_not_run_twice(settings: dict[str, Any]) -> None:
    assert samplings(with_settings(**settings)) == [Sampling(PLAIN)]


def test_a_model_without_generation_settings() -> None:
    model = tiny_model("llama")
    model.network.generation_config = None
    assert samplings(model) == [Sampling()]


def test_plain_texts_are_drawn_from_everything() -> None:
    assert isinstance(Sampling().rule(np.zeros(3), [1]), Sampled)


@pytest.mark.parametrize(("name", "value"), [("temperature", -1.0), ("top_p", -0.5), ("top_k", "many"), ("min_p", 7.0)])
def test_settings_that_transformers_refuses(name: str, value: Any) -> None:
    model = with_settings()
    setattr(model.network.generation_config, name, value)
    with pytest.raises(PrunelensError) as error:
        samplings(model)
    for word in (name, "generation_config.json", "correct it"):
        assert word in str(error.value)
