"""Quantising through torchao: which matrices, to which numbers, and the same when saved and opened again."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import COMMON, tiny_model, tiny_network
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.models.surgery.drop import dropped
from prunelens.models.surgery.shared_copy import shared_copy_of
from prunelens.pruning.apply import apply
from prunelens.pruning.quantize import quantize, save_quantized
from prunelens.pruning.recipe import parse_recipe

IDS = torch.tensor([[5, 9, 31, 7, 50]])


def wide_model(dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    config = LlamaConfig(**COMMON | {"hidden_size": 64, "intermediate_size": 128})
    return wrap(AutoModelForCausalLM.from_config(config).eval().to(dtype))


def assert_rounded(found: torch.Tensor, weight: torch.Tensor, to: str) -> None:
    """To the nearest of 256 or 16 steps that span twice the largest number of a row (int8) or of 32 inputs (int4)."""
    exact = weight.dtype == torch.float32
    low, high = (-128, 127) if to == "int8" else (-8, 7)
    groups = weight.double().unflatten(1, (-1, weight.shape[1] if to == "int8" else 32))
    largest = groups.abs().amax(dim=-1, keepdim=True)
    numbers = found.qdata.double().unflatten(1, groups.shape[1:])
    scales = found.scale.double().reshape(largest.shape)
    assert torch.allclose(scales, largest / ((high - low) / 2), rtol=1e-6 if exact else 2**-8, atol=0)
    assert low <= numbers.min() < low + 2
    assert high - 2 < numbers.max() <= high
    nearest = (groups / scales).round().clamp(low, high)
    assert (numbers - nearest).abs().max() <= 1
    inside = groups.abs() < largest  # the largest number lies half-way between two steps
    assert (numbers != nearest)[inside].double().mean() <= (0 if exact else 0.08)
    whole = (numbers * scales).flatten(1)
    assert torch.allclose(found.dequantize().double(), whole, rtol=1e-6 if exact else 2**-8, atol=0)


@pytest.mark.parametrize("to", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_linear_layers_of_the_blocks_are_quantised(to: str, dtype: torch.dtype) -> None:
    model = wide_model(dtype)
    before = {name: weight.clone() for name, weight in model.network.named_parameters()}
    twin = shared_copy_of(model)
    quantize(twin, to)  # type: ignore[arg-type]
    for name, weight in twin.network.named_parameters():
        if name.endswith("proj.weight"):
            assert_rounded(weight, before[name], to)
        else:
            assert weight is dict(model.network.named_parameters())[name], name
    assert all(torch.equal(before[name], weight) for name, weight in model.network.named_parameters())
    assert torch.isfinite(twin.network(IDS).logits).all()
    assert len(twin.network.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)[0]) > 5


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_saved_and_opened_it_is_what_it_was_in_memory(tmp_path: Path, to: str) -> None:
    model = wide_model()
    plain, target = tmp_path / "plain", tmp_path / "target"
    model.network.save_pretrained(plain)
    target.mkdir()
    save_quantized(plain, target, to)  # type: ignore[arg-type]
    opened = AutoModelForCausalLM.from_pretrained(target)
    twin = shared_copy_of(model)
    quantize(twin, to)  # type: ignore[arg-type]
    with torch.inference_mode():
        assert torch.equal(opened(IDS).logits, twin.network(IDS).logits)


def test_a_family_that_computes_otherwise_once_quantised(tmp_path: Path) -> None:
    """Jamba multiplies in another order where its configuration says that it is quantised."""
    model = wrap(tiny_network("jamba", torch.bfloat16))
    plain, target = tmp_path / "plain", tmp_path / "target"
    model.network.save_pretrained(plain)
    target.mkdir()
    save_quantized(plain, target, "int8")
    twin = shared_copy_of(model)
    before = model.network(IDS).logits
    quantize(twin, "int8")
    with torch.inference_mode():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(target)(IDS).logits, twin.network(IDS).logits)
        assert torch.equal(model.network(IDS).logits, before)
    assert not hasattr(model.network.config, "_is_quantized")


def test_what_stays_is_told() -> None:
    mixture = apply(parse_recipe("quantize:int8"), tiny_model("mixtral"))
    assert any("experts in one tensor" in note for note in mixture.notes)
    layer, dense = mixture.model.network.model.layers[0], mixture.dense.network.model.layers[0]
    assert layer.mlp.experts.gate_up_proj is dense.mlp.experts.gate_up_proj
    assert type(layer.self_attn.q_proj.weight) is not type(dense.self_attn.q_proj.weight)
    narrow = apply(parse_recipe("quantize:int4"), tiny_model())  # 48 inputs of down_proj are no multiple of 32
    assert any("multiple of 32" in note for note in narrow.notes)
    assert any("one byte" in note for note in narrow.notes)
    assert type(narrow.model.network.model.layers[0].mlp.down_proj.weight) is torch.nn.Parameter
    assert not apply(parse_recipe("quantize:int8"), tiny_model()).notes


def test_parts_are_taken_out_of_a_quantised_model() -> None:
    pruned = apply(parse_recipe("drop-attention@1+drop-mlp@2+quantize:int8"), wide_model())
    layers = pruned.variant.model.network.model.layers
    assert layers[1].self_attn.q_proj.weight.numel() == layers[2].mlp.up_proj.weight.numel() == 0
    with torch.inference_mode():
        found = pruned.variant.model.network(IDS).logits
        with dropped(pruned.model.anatomy, pruned.drop):
            assert torch.equal(found, pruned.model.network(IDS).logits)


@pytest.mark.parametrize("family", ["mamba", "jamba", "qwen3_next", "deepseek_v3", "phi3", "opt", "lfm2"])
def test_families_run_quantised(family: str) -> None:
    pruned = apply(parse_recipe("quantize:int8"), tiny_model(family))
    assert torch.isfinite(pruned.variant.model.network(IDS).logits).all()


@pytest.mark.parametrize("family", ["gpt2", "falcon"])
def test_a_model_without_plain_linear_layers_is_refused(family: str) -> None:
    with pytest.raises(PrunelensError, match="none that torchao takes"):
        apply(parse_recipe("quantize:int8"), tiny_model(family))


def test_what_is_quantised_cannot_be_masked() -> None:
    twin = shared_copy_of(tiny_model())
    quantize(twin, "int8")
    with pytest.raises(PrunelensError, match="before quantisation"):
        apply(parse_recipe("magnitude:0.5"), twin)


def test_without_torchao_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(PrunelensError, match=r"torchao; install it with `pip install"):
        apply(parse_recipe("quantize:int4"), model)


def test_bytes_are_counted_as_stored() -> None:
    model = wide_model()
    linear = sum(w.numel() for name, w in model.network.named_parameters() if name.endswith("proj.weight"))
    rows = sum(w.shape[0] for name, w in model.network.named_parameters() if name.endswith("proj.weight"))
    pruned = apply(parse_recipe("quantize:int8"), model)
    others = model.network.num_parameters() - linear
    assert pruned.num_bytes == 4 * others + linear + rows * (4 + 1)  # a scale and a zero point for each row
    assert apply(parse_recipe("magnitude:0.5"), model).num_bytes == model.weight_bytes
    assert apply(parse_recipe("drop-mlp@1"), model).num_bytes == model.weight_bytes - 4 * (3 * 64 * 128 + 64)
