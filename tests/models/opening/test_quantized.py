"""Quantised checkpoints of other libraries open as they are, or an error names the library."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TorchAoConfig

from conftest import COMMON, tiny_tokenizer, words
from prunelens.api import compare
from prunelens.errors import PrunelensError
from prunelens.models.opening.loading import load
from prunelens.results import Comparison

IDS = torch.tensor([[5, 9, 31, 7, 50]])
CONFIGS = {
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao int4": lambda: TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
COMPRESSED_TENSORS = {
    "compressed-tensors int8": (QuantizationArgs(num_bits=8, strategy="channel", symmetric=True), "int-quantized"),
    "compressed-tensors int4": (
        QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True),
        "pack-quantized",
    ),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("dense"), torch.float32)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("half"), torch.bfloat16)


def saved(folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**COMMON | {"hidden_size": 64, "intermediate_size": 128})
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def with_compressed_tensors(dense: Path, target: Path, args: QuantizationArgs, layout: str) -> None:
    network: Any = AutoModelForCausalLM.from_pretrained(dense)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format=layout, quantization_status="initialized"
    )
    apply_quantization_config(network, config)
    for module in network.modules():
        if hasattr(module, "weight_scale"):
            width = module.weight.shape[1] if args.strategy == "channel" else 32
            largest = module.weight.data.unflatten(1, (-1, width)).abs().amax(dim=-1)
            scale = largest / (2 ** (args.num_bits - 1) - 1)
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(network, quantization_format=layout)
    compressor.compress_model(network)
    network.save_pretrained(target)
    compressor.update_config(target)


def quantized(kind: str, dense: Path, target: Path) -> Path:
    if kind in CONFIGS:
        opened = AutoModelForCausalLM.from_pretrained(dense, quantization_config=CONFIGS[kind](), device_map="cpu")
        opened.save_pretrained(target)
    else:
        with_compressed_tensors(dense, target, *COMPRESSED_TENSORS[kind])
    tiny_tokenizer().save_pretrained(target)
    return target


def assert_every_sublayer_is_measured(found: Comparison) -> None:
    """All matrices of the blocks have changed and do something; embedding, norms and head are the dense ones."""
    rows = found.tables["attribution"].to_pylist()
    changed = {(row["sublayer"], row["layer_idx"]) for row in rows if row["changed"]}
    assert changed == {(kind, layer_idx) for kind in ("attention", "mlp") for layer_idx in range(4)}
    assert all(row["kl_alone"] > 0 and row["kl_all_but"] > 0 for row in rows if row["changed"])


@pytest.mark.parametrize("kind", [*CONFIGS, *COMPRESSED_TENSORS])
def test_it_opens_and_is_compared(kind: str, dense: Path, tmp_path: Path) -> None:
    folder = quantized(kind, dense, tmp_path / "quantized")
    model = load(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    with torch.inference_mode():
        expected = plain(IDS).logits  # of nf4 rounded to bfloat16, on processors that know it
        assert torch.allclose(model.network(IDS).logits, expected, atol=0.01 if "nf4" in kind else 1e-6)
        before = load(dense).network(IDS).logits
        assert 0 < (model.network(IDS).logits - before).abs().max() < 0.5 * before.abs().max()
        own, theirs = (
            network.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
            for network in (model.network, plain)
        )
    assert own.shape == (1, 9)
    assert "nf4" in kind or torch.equal(own, theirs)
    assert model.dtype == torch.float32
    assert model.weight_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(words(3, 4, 5) + "\n" + words(6, 7, 8, 9) + "\n")
    found = compare(dense, str(folder), prompts=prompts, max_new_tokens=4, attribute=True)
    record = found.summary[0]
    assert 0 < record["kl"]["mean"] < 1
    assert 0.2 < record["size"]["saved"] < 0.9
    assert found.tables["layers"].num_rows
    assert_every_sublayer_is_measured(found)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_it_computes_in_its_own_dtype(kind: str, half: Path, tmp_path: Path) -> None:
    folder = quantized(kind, half, tmp_path / "quantized")
    model = load(folder, dtype="float32")  # its scales are made for bfloat16
    assert model.dtype == model.stored_dtype == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    with torch.inference_mode():
        found, expected = model.network(IDS).logits, plain(IDS).logits
        assert found.dtype == torch.bfloat16
        assert torch.allclose(found, expected, atol=0.02) if "nf4" in kind else torch.equal(found, expected)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(words(3, 4, 5) + "\n", encoding="utf-8")
    result = compare(load(half, dtype="bfloat16"), folder, prompts=prompts, max_new_tokens=4, attribute=True)
    assert 0 < result.summary[0]["kl"]["mean"] < 1
    assert_every_sublayer_is_measured(result)


def with_config(dense: Path, target: Path, quantization: dict[str, Any]) -> Path:
    shutil.copytree(dense, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return target


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, "gptqmodel and optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, "gptqmodel"),
        ({"quant_method": "homemade", "bits": 3}, "homemade"),
        ({"bits": 3}, "None"),
    ],
)
def test_what_does_not_open_is_explained(quantization: dict[str, Any], said: str, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(PrunelensError, match=said):
        load(with_config(dense, tmp_path / "quantized", quantization))


@pytest.mark.parametrize(
    ("method", "module"),
    [
        ("torchao", "torchao"),
        ("bitsandbytes", "bitsandbytes"),
        ("compressed-tensors", "compressed_tensors"),
        ("hqq", "hqq"),
    ],
)
def test_a_missing_library_is_named(
    method: str, module: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == module else find(name, *more))
    quantization = {"quant_method": method, "load_in_8bit": method == "bitsandbytes"}
    with pytest.raises(PrunelensError, match=f"needs {method} to open; install with `pip install {method}`"):
        load(with_config(dense, tmp_path / "quantized", quantization))
