"""Checkpoints that also see or hear: opened whole, their decoder is compared and cut, their other parts are kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from conftest import tiny_tokenizer
from prunelens.api import prune
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.models.opening.loading import load
from prunelens.models.saving.export import export
from prunelens.models.surgery.drop import Drop, dropped

TEXT = torch.tensor([[4, 40, 7, 90, 11, 3, 64, 22]])
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}


def llava() -> Any:
    text, tower = transformers.LlamaConfig(**SIZES), transformers.CLIPVisionConfig(**TOWER, projection_dim=16)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=tower, image_token_id=96)
    )


def qwen2_vl() -> Any:
    tower = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14, "mlp_ratio": 2}
    ids = dict(zip(("image_token_id", "video_token_id"), (96, 95), strict=True))
    ids |= dict(zip(("vision_start_token_id", "vision_end_token_id"), (94, 93), strict=True))
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=SIZES | MROPE, vision_config=tower, **ids)
    )


def mistral3() -> Any:
    text = transformers.MistralConfig(**SIZES, sliding_window=None)
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config=text, vision_config=transformers.PixtralVisionConfig(**TOWER), image_token_id=96
        )
    )


def gemma3() -> Any:
    ids = {"image_token_index": 96, "boi_token_index": 95, "eoi_token_index": 94}
    text = SIZES | {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
    text["layer_types"] = text["layer_types"][:3]
    tower = TOWER | {"model_type": "siglip_vision_model"}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4, **ids)
    )


def qwen3_vl() -> Any:
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    tower |= {"deepstack_visual_indexes": [0], "patch_size": 14}
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(
            text_config=SIZES | MROPE | {"head_dim": 8}, vision_config=tower, image_token_id=96, video_token_id=95
        )
    )


def qwen2_audio() -> Any:
    tower = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    tower |= {"num_mel_bins": 8, "max_source_positions": 16}
    text = transformers.Qwen2Config(**SIZES)
    return transformers.Qwen2AudioForConditionalGeneration(
        transformers.Qwen2AudioConfig(audio_config=tower, text_config=text, audio_token_index=96)
    )


def voxtral() -> Any:
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    tower |= {"num_mel_bins": 8, "max_source_positions": 16}
    text = transformers.LlamaConfig(**SIZES)
    return transformers.VoxtralForConditionalGeneration(
        transformers.VoxtralConfig(audio_config=tower, text_config=text, audio_token_id=96)
    )


def qwen3_5() -> Any:
    linear = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    linear |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 8}
    types = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    return transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(
            text_config=SIZES | linear | types, vision_config=tower | {"patch_size": 14}, image_token_id=96
        )
    )


FAMILIES = (llava, qwen2_vl, mistral3, gemma3, qwen3_vl, qwen2_audio, voxtral, qwen3_5)
each = pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
pytestmark = pytest.mark.filterwarnings("ignore")  # families warn about tiny sizes


def saved(make: Callable[[], Any], folder: Path) -> Any:
    """A random network whose weights matter, saved with tokenizer and the settings of a processor."""
    torch.manual_seed(0)
    network = make().eval()
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.2)
    network.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size":   {"height": 28}}')
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}\n")
    return network


def logits(network: Any) -> torch.Tensor:
    with torch.inference_mode():
        return network(input_ids=TEXT, use_cache=False).logits


def written(network: Any) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits, step by step with the cache."""
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    with torch.inference_mode():
        found = network.generate(TEXT, attention_mask=torch.ones_like(TEXT), output_logits=True, **settings)
    return found.sequences[0].tolist(), torch.stack(found.logits)


def reopened(folder: Path) -> Any:
    """What plain transformers makes of it, by the class that its config.json names."""
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    network, found = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return network.eval()


@each
def test_a_checkpoint_is_opened_whole(tmp_path: Path, make: Callable[[], Any]) -> None:
    network = saved(make, tmp_path / "dense")
    model = load(tmp_path / "dense", device="cpu")
    assert type(model.network) is type(network)
    assert torch.equal(logits(model.network), logits(network))
    assert {name: tuple(tensor.shape) for name, tensor in model.network.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in network.state_dict().items()
    }
    assert (len(model.layers), model.context_length, model.eos_ids, model.notes) == (3, 64, [2], [])
    assert model.weight_bytes == sum(file.stat().st_size for file in (tmp_path / "dense").glob("*.safetensors"))


def zeroed(model: Model, folder: Path, drop: Drop) -> Any:
    """The checkpoint opened by transformers, the output projections of dropped sublayers set to zero by hand."""
    network = reopened(folder)
    for kind in ("attention", "mlp"):
        for layer_idx in getattr(drop, kind):
            part = model.anatomy.blocks[layer_idx].find(kind)
            assert part is not None
            last = {"o_proj", "out_proj", "down_proj"}
            names = [name for name, _ in network.get_submodule(part.name).named_modules() if name in last]
            assert len(names) == 1
            network.get_submodule(part.name).get_submodule(names[0]).weight.data.zero_()
    return network


@each
def test_what_is_dropped_equals_what_is_zeroed_by_hand(tmp_path: Path, make: Callable[[], Any]) -> None:
    saved(make, tmp_path / "dense")
    model, drop = load(tmp_path / "dense", device="cpu"), Drop(attention=frozenset({0}), mlp=frozenset({1, 2}))
    expected = zeroed(model, tmp_path / "dense", drop)
    whole = logits(model.network)
    with dropped(model.anatomy, drop):
        assert torch.allclose(logits(model.network), logits(expected), atol=1e-5)
        assert not torch.allclose(logits(model.network), whole, atol=1e-2)
        tokens, steps = written(model.network)
    expected_tokens, expected_steps = written(expected)
    assert tokens == expected_tokens
    assert torch.allclose(steps, expected_steps, atol=1e-5)


@each
@pytest.mark.parametrize("drop", [Drop(block=frozenset({0})), Drop(block=frozenset({2}), attention=frozenset({0}))])
def test_what_is_saved_is_whole_and_computes_the_same(tmp_path: Path, make: Callable[[], Any], drop: Drop) -> None:
    saved(make, tmp_path / "dense")
    model = load(tmp_path / "dense", device="cpu")
    assert export(model, tmp_path / "pruned", drop).max_difference == 0.0
    network = reopened(tmp_path / "pruned")
    with dropped(model.anatomy, drop):
        assert torch.equal(logits(network), logits(model.network))
        assert written(network)[0] == written(model.network)[0]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "pruned"))
    others = [name for name in before if ".layers." not in name or "vision" in name or "audio" in name]
    assert others
    assert all(torch.equal(before[name], after[name]) for name in others)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 2
    tower = "vision_config" if "vision_config" in config else "audio_config"
    assert config[tower] | {"dtype": ""} == json.loads((tmp_path / "dense" / "config.json").read_text())[tower] | {
        "dtype": ""
    }
    for name in ("preprocessor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "pruned" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes(), name
    assert type(load(tmp_path / "pruned", device="cpu").network) is type(network)


def test_what_is_saved_counts_the_tower(tmp_path: Path) -> None:
    saved(qwen3_5, tmp_path / "dense")
    result = prune(load(tmp_path / "dense", device="cpu"), "drop-block@0", tmp_path / "pruned")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "pruned"))
    block = [tensor for name, tensor in before.items() if ".layers.0." in name]
    gone = sum(tensor.numel() * 4 for tensor in block) - result.dense_bytes + result.num_bytes
    assert abs(gone) < 3000  # the header is shorter too
    assert sum(tensor.numel() for tensor in after.values()) < sum(tensor.numel() for tensor in before.values())
    assert "only what it makes of text was checked" in " ".join(result.notes)


def test_a_tower_that_is_left_out_is_told_and_not_counted(tmp_path: Path) -> None:
    saved(qwen3_5, tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["Qwen3_5ForCausalLM"]}))
    model = load(tmp_path / "dense", device="cpu")
    tower = {name: one for name, one in load_file(tmp_path / "dense" / "model.safetensors").items() if "visual" in name}
    assert type(model.network).__name__ == "Qwen3_5ForCausalLM"
    assert len(model.notes) == 1
    assert f"{len(tower)} tensors in" in model.notes[0]
    assert "not read by the model (model.visual." in model.notes[0]
    whole = (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert model.weight_bytes == whole - sum(one.numel() * one.itemsize for one in tower.values())


def test_all_parts_come_back_in_the_dtype_they_were_stored_in(tmp_path: Path) -> None:
    saved(llava, tmp_path / "float32")
    wide = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    wide.save_pretrained(tmp_path / "dense")
    prune(load(tmp_path / "dense", device="cpu"), "drop-mlp@0", tmp_path / "pruned")
    assert {tensor.dtype for tensor in load_file(tmp_path / "pruned" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    network = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "pruned", dtype="auto")
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {"bfloat16"}


def test_settings_in_the_old_flat_form_are_cut_too(tmp_path: Path) -> None:
    saved(qwen2_vl, tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    values = json.loads(path.read_text())
    flat = {key: value for key, value in values.pop("text_config").items() if key != "model_type"}
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_theta": 1e4}
    del flat["rope_parameters"]
    path.write_text(json.dumps(flat | values))
    model, drop = load(tmp_path / "dense", device="cpu"), Drop(block=frozenset({1}))
    assert model.context_length == 64
    export(model, tmp_path / "pruned", drop)
    with dropped(model.anatomy, drop):
        assert torch.equal(logits(reopened(tmp_path / "pruned")), logits(model.network))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (
            lambda: transformers.CLIPModel(
                transformers.CLIPConfig(
                    text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 97},
                    vision_config=TOWER,
                )
            ),
            "found CLIPModel",
        ),
        (lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)), "found CLIPVisionModel"),
        (
            lambda: transformers.WhisperForConditionalGeneration(
                transformers.WhisperConfig(
                    vocab_size=97,
                    pad_token_id=0,
                    eos_token_id=2,
                    d_model=16,
                    encoder_layers=1,
                    decoder_layers=1,
                    encoder_attention_heads=2,
                    decoder_attention_heads=2,
                )
            ),
            "found WhisperForConditionalGeneration",
        ),
    ],
)
def test_what_is_no_decoder_is_refused_in_one_sentence(tmp_path: Path, network: Callable[[], Any], reason: str) -> None:
    made = network()
    made.generation_config = transformers.GenerationConfig()
    made.config.save_pretrained(tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [type(made).__name__]}))
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PrunelensError, match=rf"expected a causal decoder in .*{reason}") as caught:
        load(tmp_path / "other", device="cpu")
    assert len(str(caught.value)) < 400
