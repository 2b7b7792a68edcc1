"""Models and tokenizers for the tests: tiny random ones of every family, and the real built-in one."""

import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prunelens.models.loading import Model, load, wrap

VOCAB_SIZE = 97
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, COMMON),
    "mistral": (transformers.MistralConfig, COMMON | {"sliding_window": 6}),
    "qwen2": (transformers.Qwen2Config, COMMON),
    "qwen3": (transformers.Qwen3Config, COMMON | {"head_dim": 8}),
    "phi3": (transformers.Phi3Config, COMMON),
    "smollm3": (transformers.SmolLM3Config, COMMON),
    "granite": (transformers.GraniteConfig, COMMON | {"residual_multiplier": 0.22, "logits_scaling": 3.0}),
    "starcoder2": (transformers.Starcoder2Config, COMMON),
    "gpt2": (transformers.GPT2Config, GPT2),
}


def tiny_network(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model whose sublayers all matter: weights and biases of a visible size."""
    kind, values = FAMILIES[family]
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(kind(**values)).eval()
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.2)
        elif not weight.data.any():
            weight.data.normal_(0, 0.1)
    return network.to(dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w3 … w96 after <pad>, <bos> and <eos>."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{token}": token for token in range(3, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Model:
    """A tiny random model, opened."""
    return wrap(tiny_network(family, dtype, seed), tiny_tokenizer(), name=f"tiny-{family}")


def words(*tokens: int) -> str:
    """Text that the tiny tokenizer turns into these token ids."""
    return " ".join(f"w{token}" for token in tokens)


def assert_stats(found: dict, row: int, expected: dict, relative: float) -> None:
    """One row of statistics against an oracle's; None there means undefined, NaN here."""
    for name, value in expected.items():
        got = found[name][row].item()
        if value is None:
            assert math.isnan(got), name
        else:
            assert got == pytest.approx(value, rel=relative, abs=1e-13), name


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny checkpoint on disk."""
    folder = tmp_path / "checkpoint"
    tiny_network("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """The real built-in model in float32."""
    return load("smollm2", dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
