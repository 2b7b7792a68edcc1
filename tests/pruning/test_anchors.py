"""Anchors equal a second model whose weights an oracle rounded, and leave the first as it was."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from conftest import tiny_model, tiny_network, tiny_tokenizer
from prunelens.models.anatomy.hooks import decoder_of, run_decoder
from prunelens.models.model import Model
from prunelens.models.opening.loading import wrap
from prunelens.pruning.anchors import ANCHORS, Anchor, round_rows, to_bfloat16, why_no_anchor

FAMILIES = ("llama", "gpt2", "gemma", "mixtral", "gpt_neox", "opt", "qwen3_next", "falcon_h1")
IDS = torch.tensor([[5, 9, 11, 3, 40, 7], [8, 8, 30, 31, 32, 33]])


def bfloat16_oracle(values: np.ndarray) -> np.ndarray:
    """Round to eight significant bits by the bits of float32, ties to even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def int8_oracle(values: np.ndarray) -> np.ndarray:
    """One row at a time, in float32."""
    found = np.zeros_like(values, dtype=np.float32)
    for index in np.ndindex(values.shape[:-1]):
        row = values[index].astype(np.float32)
        scale = np.float32(np.abs(row).max() / np.float32(127))
        found[index] = np.round(row / scale) * scale if scale > 0 else row
    return found


def rounded_by_hand(model: Model, kind: str) -> Model:
    """A second model with weights that the oracles rounded in place."""
    network = copy.deepcopy(model.network)
    other = wrap(network, tiny_tokenizer(), name="by hand")
    if kind == "bfloat16":
        for weight in network.parameters():
            weight.data = torch.from_numpy(bfloat16_oracle(weight.detach().numpy()))
        network.tie_weights()
        return other
    for block in other.anatomy.blocks:
        for module in block.module.modules():
            if isinstance(module, Conv1D):
                module.weight.data = torch.from_numpy(int8_oracle(module.weight.detach().numpy().T).T.copy())
            elif isinstance(module, nn.Linear):
                module.weight.data = torch.from_numpy(int8_oracle(module.weight.detach().numpy()))
            elif not isinstance(module, nn.Conv1d):
                for name, weight in module._parameters.items():
                    if weight is not None and weight.ndim == 3:
                        transposed = getattr(module, "is_transposed", False)
                        values = weight.detach().numpy()
                        values = values.swapaxes(1, 2) if transposed else values
                        rounded = int8_oracle(values)
                        rounded = rounded.swapaxes(1, 2).copy() if transposed else rounded
                        module._parameters[name] = nn.Parameter(torch.from_numpy(rounded))
    return other


@pytest.mark.parametrize("kind", ANCHORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_anchor_is_the_model_with_rounded_weights(family: str, kind: str) -> None:
    model = tiny_model(family)
    before = dict(model.network.named_parameters())
    other = rounded_by_hand(model, kind)
    with torch.inference_mode():
        plain = run_decoder(decoder_of(model.network), IDS)
        wanted = run_decoder(decoder_of(other.network), IDS)
        anchor = Anchor(model, kind)  # type: ignore[arg-type]
        with anchor.running():
            found = run_decoder(decoder_of(model.network), IDS)
        assert torch.allclose(found, wanted, atol=1e-5)
        assert not torch.allclose(found, plain, atol=1e-5)
        rows = found.flatten(0, 1)
        assert torch.allclose(anchor.head(rows), other.head(rows), atol=1e-4)
        assert torch.equal(run_decoder(decoder_of(model.network), IDS), plain)
    after = dict(model.network.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_the_head_of_int8_is_the_dense_one_and_of_bfloat16_is_rounded() -> None:
    model = tiny_model("llama")
    states = torch.randn(3, 32)
    dense = model.head(states)
    assert torch.equal(Anchor(model, "int8").head(states), dense)
    rounded = Anchor(model, "bfloat16").head(states)
    weight = torch.from_numpy(bfloat16_oracle(model.network.lm_head.weight.detach().numpy()))
    assert torch.allclose(rounded, states @ weight.T, atol=1e-5)
    assert not torch.equal(rounded, dense)


def test_weights_come_back_when_the_run_fails() -> None:
    model = tiny_model("llama")
    before = dict(model.network.named_parameters())
    with pytest.raises(IndexError), Anchor(model, "bfloat16").running():
        run_decoder(decoder_of(model.network), torch.tensor([[10_000]]))
    layer = model.anatomy.blocks[1].module
    handle = layer.register_forward_pre_hook(lambda *_: None)
    fails = layer.mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), Anchor(model, "int8").running():
        run_decoder(decoder_of(model.network), IDS)
    handle.remove()
    fails.remove()
    after = dict(model.network.named_parameters())
    assert all(after[name] is before[name] for name in before)


def test_rounding_against_the_bits() -> None:
    values = torch.randn(64, 33) * torch.logspace(-20, 20, 64)[:, None]
    assert np.array_equal(to_bfloat16(values).numpy(), bfloat16_oracle(values.numpy()))
    values = torch.randn(5, 7, 33)
    values[2, 3] = 0
    assert np.array_equal(round_rows(values, False).numpy(), int8_oracle(values.numpy()))
    assert torch.equal(round_rows(values.transpose(1, 2), True), round_rows(values, False).transpose(1, 2))
    assert torch.equal(round_rows(values.double(), False), round_rows(values, False).double())


def test_what_cannot_be_rounded_says_why() -> None:
    model = tiny_model("llama")
    assert why_no_anchor(model, "bfloat16") == why_no_anchor(model, "int8") == ""
    stored = wrap(tiny_network("llama").to(torch.bfloat16).float(), tiny_tokenizer(), name="from bfloat16")
    assert "bfloat16 number already" in why_no_anchor(stored, "bfloat16")
    assert why_no_anchor(stored, "int8") == ""
    away = wrap(tiny_network("llama"), tiny_tokenizer(), name="away")
    away.network.to("meta")
    assert "offloaded" in why_no_anchor(away, "int8")
