"""Every family that transformers knows, tiny: what it is built of, and whether it opens.

`python tests/families.py` writes docs/families.md anew.
"""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from prunelens.errors import PrunelensError
from prunelens.models.opening.loading import quiet, wrap

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
MOST_PARAMETERS = 20_000_000
LAYERS = 4

# A value for every name that a configuration may know a size by.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "dim", "word_embed_proj_dim", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "v_head_dim", "head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "mamba_d_state", "ssm_state_size", "state_size", "mamba_d_head"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 4),
    "vocab_size": 97,
    "num_key_value_heads": 2,
    "sliding_window": 6,
    "window_size": 6,
    "q_lora_rank": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "is_decoder": True,
    "attention_window_size": 6,
    "use_mamba_kernels": False,
    "shared_intermediate_size": 24,
    "moe_num_shared_experts": 1,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "mamba_n_groups": 2,
    "n_groups": 2,
    "n_group": 2,
    "num_expert_group": 2,
    "num_experts_per_token": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "residual_multiplier": 0.22,
    "mamba_head_dim": 8,
}
VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim", "out_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 2),
    "image_size": 28,
    "patch_size": 14,
}
MLA = {"num_key_value_heads": 4, "head_dim": 4}
# What a family needs beside that, because its own numbers must fit one another.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "youtu"), MLA),
    **dict.fromkeys(("glm4_moe_lite", "minicpm3", "sarvam_mla", "longcat_flash", "kimi_linear", "mistral4"), MLA),
    **dict.fromkeys(("dots3_note", "dots3_note_text"), MLA),
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "attention_in_multiplier": 0.7,
        "attention_out_multiplier": 1.3,
        "ssm_in_multiplier": 0.9,
        "ssm_out_multiplier": 0.6,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "recurrent_gemma": {"num_key_value_heads": 1},
    "xlstm": {"hidden_size": 128, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
ROTATED = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
# The same for the language model inside.
OWN_TEXT: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl"), ROTATED
    ),
    **dict.fromkeys(("kimi_k25", "mistral_large4", "glm5_next", "deepseek_ocr2"), MLA),
}


def known_families() -> list[str]:
    """Model types of causal language models, and of those that read images too."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def build(family: str) -> Any:
    """A tiny random network of a family.

    Raises:
        Exception: whatever transformers says where it cannot be built of such a configuration.
    """
    kind = CONFIG_MAPPING[family]
    known = kind().to_dict()
    values = _chosen(SMALL, known)
    for name in ("text_config", "language_config", "llm_config", "decoder", "thinker_config"):
        if isinstance(known.get(name), dict):
            values[name] = (
                _chosen(SMALL, known[name]) | {"model_type": known[name].get("model_type")} | OWN_TEXT.get(family, {})
            )
    if isinstance(known.get("vision_config"), dict):
        values["vision_config"] = _chosen(VISION, known["vision_config"])
    config = kind(**values | OWN.get(family, {}))
    opener = AutoModelForCausalLM if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    with torch.device("meta"):
        size = sum(weight.numel() for weight in opener.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters even so")
    torch.manual_seed(0)
    network = opener.from_config(config).float().eval()
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.2)
    return network


def _chosen(values: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in known}


def listed() -> dict[str, str]:
    """What docs/families.md says of each family: `opens`, `refused` or `not built`."""
    rows = (line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `"))
    return {row[0].strip("| `"): row[1] for row in rows}


def judge(family: str) -> tuple[str, str]:
    """What becomes of a family, and what there is to say about it."""
    try:
        network = build(family)
    except Exception as fault:  # transformers raises anything
        return "not built", f"{type(fault).__name__}: {fault}"
    try:
        model = wrap(network)
    except PrunelensError as error:
        text = str(error)
        return "refused", (text.partition("): ")[2] or text).partition("; this is not supported")[0]
    return "opens", "; ".join(model.notes)


def write_page() -> None:
    """Write docs/families.md."""
    with quiet():
        found = {family: judge(family) for family in known_families()}
    counts = {word: sum(one == word for one, _ in found.values()) for word in ("opens", "refused", "not built")}
    lines = [
        "# Families",
        "",
        f"Every model type that transformers {transformers.__version__} knows as a causal language model, or as one "
        "that reads images too (of those the decoder),",
        "built tiny with random weights and opened. A configuration with other switches may fare otherwise: what "
        "decides is the proof on opening,",
        "not this list. Of every family that opens, tests show that a dropped part equals one emptied by hand, in a "
        "whole pass and in cached",
        "generation beside other prompts. Written by `python tests/families.py`.",
        "",
        f"{counts['opens']} open, {counts['refused']} are refused, {counts['not built']} could not be built tiny from "
        "a configuration alone.",
        "",
        "| family | | |",
        "|---|---|---|",
        *(f"| `{family}` | {word} | {_cell(text)} |" for family, (word, text) in found.items()),
    ]
    PAGE.write_text("\n".join(lines) + "\n")


def _cell(text: str) -> str:
    """Text on one line of a table, cut where it runs on."""
    flat = " ".join(text.split()).replace("|", "/")
    return flat if len(flat) <= 240 else f"{flat[:239]}…"


if __name__ == "__main__":
    write_page()
