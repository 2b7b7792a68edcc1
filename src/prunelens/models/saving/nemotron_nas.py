"""The layout `nemotron-nas`: a Llama whose blocks may lack their attention or their MLP, weights and norms included.

Its config.json has an entry a block (`block_configs`) with the group size of the attention, a multiple of the hidden
size for the MLP, and whether each is there at all. Serving programs read it; transformers has no class for it.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prunelens.errors import PrunelensError
from prunelens.models.opening.checkpoint import INDEX
from prunelens.models.opening.record import recorded_drop

MODEL_TYPE = "nemotron-nas"
ARCHITECTURE = "DeciLMForCausalLM"
FAMILIES = ("llama", "mistral")
ROUNDING = 256
"""Programs round the size of an MLP up to a multiple of this."""
PARTS = {
    "self_attn": "attention",
    "input_layernorm": "attention",
    "mlp": "mlp",
    "post_attention_layernorm": "mlp",
}
"""Which sublayer the children of a Llama block belong to."""
LAYER = re.compile(r"model\.layers\.(\d+)\.(\w+)\.")
KEPT = (
    "attention_bias attention_dropout bos_token_id eos_token_id pad_token_id hidden_act hidden_size initializer_range "
    "max_position_embeddings mlp_bias num_attention_heads num_hidden_layers rms_norm_eps tie_word_embeddings "
    "use_cache vocab_size"
).split()


def check(config: Any) -> None:
    """Refuse a model that the layout cannot express.

    Args:
        config: of the checkpoint, with the dropped sublayers recorded in it.

    Raises:
        PrunelensError: another family, a sliding window, other sizes, or a first sublayer that is no attention.
    """
    if config.model_type not in FAMILIES:
        raise _unsaid(f"a family of {' or '.join(FAMILIES)}, found {config.model_type}")
    window = getattr(config, "sliding_window", None)
    heads, size = config.num_attention_heads, config.hidden_size
    head_size = config.head_dim or size // heads
    drop = recorded_drop(config)
    first = next((idx for idx in range(config.num_hidden_layers) if idx not in drop.attention & drop.mlp), 0)
    if window:
        raise _unsaid(f"no sliding window, found one of {window} tokens")
    if head_size * heads != size:
        raise _unsaid(f"heads of {size} / {heads} values, found {head_size}")
    if config.intermediate_size % ROUNDING:
        raise _unsaid(f"an intermediate size that is a multiple of {ROUNDING}, found {config.intermediate_size}")
    if first in drop.attention:
        raise _unsaid(f"the attention of layer {first} to stay, because servers start with one, found it dropped")


def _unsaid(needs: str) -> PrunelensError:
    return PrunelensError(f"the layout {MODEL_TYPE} needs {needs}; choose the layout transformers")


def convert(plain: Path, out: Path) -> None:
    """Turn a plain checkpoint whose config.json records dropped sublayers into one without them, file by file."""
    values = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    drop = _dropped(values)
    kept_by_file = {}
    for file in sorted(plain.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            kept = {name: opened.get_tensor(name) for name in opened.keys() if not _belongs(name, drop)}  # noqa: SIM118
        save_file(kept, out / file.name, metadata={"format": "pt"})
        kept_by_file[file.name] = list(kept)
    if (plain / INDEX).is_file():
        index = json.loads((plain / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {"total_size": sum((out / name).stat().st_size for name in kept_by_file)}
        index["weight_map"] = {name: file for file, names in kept_by_file.items() for name in names}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (out / "config.json").write_text(json.dumps(_described(values, drop), indent=2) + "\n", encoding="utf-8")


def left_out(name: str, config: Any) -> bool:
    """Whether a parameter, by its name in a Llama network, belongs to a sublayer that the layout leaves out."""
    drop = recorded_drop(config)
    return _belongs(name, {"attention": drop.attention, "mlp": drop.mlp})


def read_back(folder: Path, kind: type, config: Any) -> Any:
    """The network that a checkpoint in this layout stands for: zeros where `block_configs` has no sublayer.

    Args:
        folder: the checkpoint.
        kind: class of the network it was made from.
        config: of that network; sizes of the blocks are taken from the folder instead.

    Raises:
        PrunelensError: tensors are missing or left over.
    """
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    blocks = values["block_configs"]
    network = kind(config)
    state = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    drop = {
        "attention": {idx for idx, block in enumerate(blocks) if block["attention"]["no_op"]},
        "mlp": {idx for idx, block in enumerate(blocks) if block["ffn"]["no_op"]},
    }
    tied = set(network.all_tied_weights_keys)
    wanted = {name for name, _ in network.named_parameters(remove_duplicate=False) if not _belongs(name, drop)}
    if wanted - tied != set(state) - tied or len(blocks) != values["num_hidden_layers"]:
        unexpected = sorted((wanted - tied) ^ (set(state) - tied))
        raise PrunelensError(
            f"expected one tensor for each parameter of the layout {MODEL_TYPE}, found {unexpected[:1]} missing or "
            "unexpected; choose the layout transformers"
        )
    shapes = {name: weight.shape for name, weight in network.named_parameters(remove_duplicate=False)}
    dtype = next(iter(state.values())).dtype
    missing = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items() if _belongs(name, drop)}
    network.load_state_dict(state | missing, strict=False, assign=True)
    network.tie_weights()
    return network.eval()


def _belongs(name: str, drop: dict[str, Any]) -> bool:
    match = LAYER.match(name)
    return match is not None and match[2] in PARTS and int(match[1]) in drop[PARTS[match[2]]]


def _dropped(values: dict[str, Any]) -> dict[str, Any]:
    return values["prunelens"]["dropped"]


def _described(values: dict[str, Any], drop: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json."""
    rope = values["rope_parameters"]
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    group = values["num_attention_heads"] // values["num_key_value_heads"]
    multiple = 3 * values["intermediate_size"] / (2 * values["hidden_size"])
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{name: values[name] for name in KEPT if name in values},
        "attention_bias": values.get("attention_bias", False),
        "mlp_bias": values.get("mlp_bias", False),
        "torch_dtype": values["dtype"],
        "num_key_value_heads": None,
        "intermediate_size": None,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "block_configs": [
            {
                "attention": _attention(None if layer in drop["attention"] else group),
                "ffn": _mlp(None if layer in drop["mlp"] else multiple),
            }
            for layer in range(values["num_hidden_layers"])
        ],
    }


def _attention(group: int | None) -> dict[str, Any]:
    return {
        "n_heads_in_group": group,
        "no_op": group is None,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }


def _mlp(multiple: float | None) -> dict[str, Any]:
    return {"ffn_mult": multiple, "no_op": multiple is None, "replace_with_linear": False, "sparsify": None}
