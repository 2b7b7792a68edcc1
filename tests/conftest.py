"""Models and tokenizers for the tests: tiny random ones of every family, and the real built-in one."""

import atexit
import functools
import math
import os
import re
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start: several tests run at once

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.collect_env
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from prunelens.cache import cache_dir
from prunelens.models.model import Model
from prunelens.models.opening.loading import load, wrap

torch.set_num_threads(1)  # tiny models: threads that wait for one another cost more than they do
torch.utils.collect_env.get_pretty_env_info = lambda: ""  # lm-eval lists all packages at each evaluation: a second

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
MOE = COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WITHOUT_KV_HEADS = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"}
FALCON = WITHOUT_KV_HEADS | {"bias": True, "ffn_hidden_size": 48}
MAMBA = {"state_size": 8, "expand": 2, "conv_kernel": 4}
ALL_FAMILIES: dict[str, tuple[type, dict[str, Any]]] = FAMILIES | {
    "stablelm": (transformers.StableLmConfig, COMMON),
    "gemma": (transformers.GemmaConfig, COMMON | {"head_dim": 8}),
    "gemma2": (transformers.Gemma2Config, COMMON | {"head_dim": 8, "sliding_window": 6}),
    "gemma3": (transformers.Gemma3TextConfig, COMMON | {"head_dim": 8, "sliding_window": 6}),
    "olmo": (transformers.OlmoConfig, COMMON),
    "olmo2": (transformers.Olmo2Config, COMMON),
    "olmo3": (transformers.Olmo3Config, COMMON | {"sliding_window": 6}),
    "phi": (transformers.PhiConfig, COMMON),
    "cohere": (transformers.CohereConfig, COMMON),
    "cohere2": (transformers.Cohere2Config, COMMON | {"sliding_window": 6}),
    "glm": (transformers.GlmConfig, COMMON | {"head_dim": 8}),
    "glm4": (transformers.Glm4Config, COMMON | {"head_dim": 8}),
    "nemotron": (transformers.NemotronConfig, COMMON),
    "gpt_neox": (transformers.GPTNeoXConfig, WITHOUT_KV_HEADS),
    "gpt_neox sequential": (transformers.GPTNeoXConfig, WITHOUT_KV_HEADS | {"use_parallel_residual": False}),
    "gptj": (transformers.GPTJConfig, GPT2 | {"rotary_dim": 4}),
    "gpt_bigcode": (transformers.GPTBigCodeConfig, GPT2),
    "falcon": (transformers.FalconConfig, FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon one norm": (transformers.FalconConfig, FALCON),
    "falcon sequential": (transformers.FalconConfig, FALCON | {"parallel_attn": False, "multi_query": False}),
    "falcon alibi": (transformers.FalconConfig, FALCON | {"parallel_attn": False, "alibi": True}),
    "opt": (transformers.OPTConfig, WITHOUT_KV_HEADS | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": (transformers.BloomConfig, GPT2 | {"hidden_size": 32}),
    "mpt": (transformers.MptConfig, GPT2 | {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 128}),
    "mixtral": (transformers.MixtralConfig, COMMON | {"num_local_experts": 4}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, MOE | {"head_dim": 8, "mlp_only_layers": [1]}),
    "olmoe": (transformers.OlmoeConfig, MOE),
    "granitemoe": (transformers.GraniteMoeConfig, COMMON | {"num_local_experts": 4, "residual_multiplier": 0.22}),
    "gpt_oss": (transformers.GptOssConfig, COMMON | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 6}),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        COMMON
        | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
        | {"qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1, "n_routed_experts": 4}
        | {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24},
    ),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        MOE
        | {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 4, "shared_expert_intermediate_size": 24}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]},
    ),
    "lfm2": (transformers.Lfm2Config, COMMON | {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "lfm2_moe": (
        transformers.Lfm2MoeConfig,
        MOE | {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1},
    ),
    "nemotron_h": (
        transformers.NemotronHConfig,
        {name: value for name, value in COMMON.items() if name != "num_hidden_layers"}
        | {"layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"], "head_dim": 8, "ssm_state_size": 8}
        | {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 4, "moe_intermediate_size": 24}
        | {"n_routed_experts": 4, "moe_shared_expert_intermediate_size": 24},
    ),
    "jamba": (
        transformers.JambaConfig,
        COMMON
        | {"num_experts": 4, "expert_layer_period": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "granitemoeshared": (
        transformers.GraniteMoeSharedConfig,
        COMMON | {"num_local_experts": 4, "shared_intermediate_size": 24, "residual_multiplier": 0.22},
    ),
    "granitemoehybrid": (
        transformers.GraniteMoeHybridConfig,
        COMMON
        | {"num_local_experts": 4, "shared_intermediate_size": 24, "residual_multiplier": 0.22, "mamba_n_heads": 8}
        | {"layer_types": ["mamba", "attention", "mamba", "attention"], "mamba_d_state": 8, "mamba_chunk_size": 4},
    ),
    "falcon_h1": (
        transformers.FalconH1Config,
        COMMON
        | {"head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
        | {"mamba_n_groups": 2, "mamba_chunk_size": 4, "attention_in_multiplier": 0.7, "ssm_in_multiplier": 0.9}
        | {"attention_out_multiplier": 1.3, "ssm_out_multiplier": 0.6},
    ),
    "mamba": (transformers.MambaConfig, COMMON | MAMBA),
    "mamba2": (
        transformers.Mamba2Config,
        COMMON | MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    ),
}


def tiny_network(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model whose sublayers all matter: weights and biases of a visible size."""
    kind, values = ALL_FAMILIES[family]
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(kind(**values)).eval()
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.2)
        elif not weight.data.any():
            weight.data.normal_(0, 0.1)
    return network.to(dtype)


@functools.cache
def shared_network(family: str) -> Any:
    """The tiny network of a family in float32, made once; for tests that leave it as it is."""
    return tiny_network(family)


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


def text_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that any text can be read, after <pad>, <bos> and <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {letter: 3 + place for place, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=1024
    )


def text_network(family: str = "llama", seed: int = 0) -> Any:
    """A tiny random network that reads text byte by byte."""
    kind, values = ALL_FAMILIES[family]
    torch.manual_seed(seed)
    length = "n_positions" if "n_positions" in values else "max_position_embeddings"
    network = AutoModelForCausalLM.from_config(kind(**(values | {"vocab_size": 259, length: 1024}))).eval()
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.2)
    return network


def text_model(family: str = "llama", seed: int = 0) -> Model:
    """The same, opened."""
    return wrap(text_network(family, seed), text_tokenizer(), name=f"text-{family}")


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


@pytest.fixture(params=ALL_FAMILIES)
def any_family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny checkpoint on disk."""
    folder = tmp_path / "checkpoint"
    tiny_network("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


MARK, RUN = "PRUNELENS_TESTS", os.environ.get("PYTEST_XDIST_WORKER", "alone")


def _own_cache() -> Path:
    """A cache folder for this run of the tests: what costs minutes to make comes from the user's, answers do not.

    Processes that a test starts keep the folder that it gives them.
    """
    if os.environ.get(MARK) == RUN:
        return cache_dir()
    os.environ[MARK] = RUN
    folder = Path(tempfile.mkdtemp(prefix="prunelens-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("models", "fingerprints", "texts"):
        (cache_dir() / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to((cache_dir() / name).resolve())
    os.environ["PRUNELENS_CACHE"] = str(folder)
    return folder


CACHE = _own_cache()


@pytest.fixture(autouse=True)
def _no_kept_answers() -> None:
    """Every test asks its models itself."""
    shutil.rmtree(CACHE / "answers", ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs the real model takes longest and goes first, so that no worker is left with it at the end."""
    items.sort(key=lambda item: "smollm2" not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """The real built-in model in float32."""
    return load("smollm2", dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)


def without_progress(stderr: str) -> str:
    """What is on stderr beside lines on progress, of which a slow machine has some."""
    return re.sub(r"^\[ *\d+ s\] .*\n", "", stderr, flags=re.MULTILINE)
