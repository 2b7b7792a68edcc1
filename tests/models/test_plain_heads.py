"""FP8 checkpoints whose head is said to be quantised and is not: opened; those that lack something: refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import COMMON
from prunelens.errors import PrunelensError
from prunelens.models.opening.loading import load

TEXT = torch.tensor([[5, 40, 7, 90, 11, 3]])
LARGEST = 448.0
"""Of float8_e4m3fn."""
pytestmark = pytest.mark.filterwarnings("ignore")  # compressed-tensors warns on its first import


def write(folder: Path, tied: bool = True, by_channel: bool = False, static: bool = False, **scheme: Any) -> Any:
    """A checkpoint as compressed-tensors stores it, by hand; the network with the same numbers, dequantised."""
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=tied)).eval()
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.2)
    network.save_pretrained(folder)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = weight
        if "_proj." not in name:
            continue
        scale = (weight.abs().amax(1, keepdim=True) if by_channel else weight.abs().amax().reshape(1)) / LARGEST
        stored[name] = (weight / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale"] = scale
        if static:
            stored[name.replace("weight", "input_scale")] = torch.tensor([0.02])
        network.get_parameter(name).data = stored[name].float() * scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = number | {"strategy": "channel" if by_channel else "tensor", "dynamic": False}
    inputs = number | {"strategy": "tensor", "dynamic": False} if static else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    values = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}
    values |= {"config_groups": {"group_0": group}, "ignore": []} | scheme
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": values}))
    return network


def logits(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        return network(input_ids=TEXT, use_cache=False).logits.float()


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_not_quantised_is_used_as_it_is(tmp_path: Path, tied: bool, by_channel: bool) -> None:
    network = write(tmp_path / "model", tied, by_channel)
    model = load(tmp_path / "model", device="cpu")
    assert torch.allclose(logits(model.network), logits(network), atol=1e-4)
    assert len(model.notes) == 1
    assert model.notes[0].startswith("lm_head in ")
    assert torch.equal(model.network.lm_head.weight, network.lm_head.weight)


def test_a_head_that_is_left_out_by_name_needs_no_remark(tmp_path: Path) -> None:
    network = write(tmp_path / "model", ignore=["lm_head"])
    model = load(tmp_path / "model", device="cpu")
    assert torch.allclose(logits(model.network), logits(network), atol=1e-4)
    assert model.notes == []


def test_inputs_with_stored_scales_do_not_need_one_for_the_head(tmp_path: Path) -> None:
    network = write(tmp_path / "model", static=True)
    model = load(tmp_path / "model", device="cpu")
    difference = logits(model.network) - logits(network)
    assert difference.norm() < 0.2 * logits(network).norm()  # the inputs of the blocks are rounded to FP8
    assert "lm_head" in model.notes[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "name", ["mlp.up_proj.weight_scale", "self_attn.k_proj.weight_scale", "mlp.gate_proj.input_scale"]
)
def test_a_scale_that_is_missing_beside_quantised_numbers_is_refused(tmp_path: Path, tied: bool, name: str) -> None:
    write(tmp_path / "model", tied, static=True)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.layers.1.{name}"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PrunelensError, match=rf"missing or have another shape \(.*{name}"):
        load(tmp_path / "model", device="cpu")


def test_another_module_in_plain_numbers_is_used_as_it_is(tmp_path: Path) -> None:
    network = write(tmp_path / "model", ignore=["lm_head"])
    path, name = tmp_path / "model" / "model.safetensors", "model.layers.2.mlp.down_proj.weight"
    tensors = load_file(path)
    tensors[name] = network.get_parameter(name).data.clone()
    del tensors[f"{name}_scale"]
    save_file(tensors, path, metadata={"format": "pt"})
    model = load(tmp_path / "model", device="cpu")
    assert torch.allclose(logits(model.network), logits(network), atol=1e-4)
    assert "model.layers.2.mlp.down_proj in " in model.notes[0]
