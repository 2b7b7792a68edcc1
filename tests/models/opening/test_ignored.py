"""What lies beside the weights: adapters are refused, what nothing reads is told, code is part of the name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from conftest import tiny_network
from prunelens.errors import PrunelensError
from prunelens.models.opening.fingerprint import identify
from prunelens.models.opening.loading import load, wrap

LORA = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 2, "target_modules": ["q_proj"]}
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELENS_CACHE", str(tmp_path_factory.mktemp("cache")))


def add_adapter(folder: Path, **values: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(LORA | values))
    save_file({NAME: torch.ones(2, 32)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("layout", ["alone", "beside config.json", "inside a whole checkpoint"])
def test_an_adapter_is_refused_in_every_layout(checkpoint: Path, layout: str) -> None:
    add_adapter(checkpoint)
    if layout != "inside a whole checkpoint":
        (checkpoint / "model.safetensors").unlink()
    if layout == "alone":
        (checkpoint / "config.json").unlink()
    for opened in (load, identify):
        with pytest.raises(
            PrunelensError, match=r"found an adapter \(LORA, of some/base\).*merge_and_unload"
        ) as caught:
            opened(str(checkpoint))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["IA3", "ADALORA", "LOHA", "BOFT"])
def test_other_kinds_of_adapters_are_named(checkpoint: Path, kind: str) -> None:
    add_adapter(checkpoint, peft_type=kind)
    with pytest.raises(PrunelensError, match=rf"found an adapter \({kind}, of some/base\); merge it"):
        load(checkpoint)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_learnt_prompts_cannot_be_merged(checkpoint: Path, kind: str) -> None:
    add_adapter(checkpoint, peft_type=kind)
    with pytest.raises(PrunelensError, match=rf"found an adapter \({kind}.*cannot be merged") as caught:
        load(checkpoint)
    assert "merge_and_unload" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    "adapter_model.bin adapters.safetensors adapters.npz adapter_model-00001-of-00002.safetensors "
    "pytorch_lora_weights.safetensors pytorch_adapter.bin".split(),
)
def test_weights_of_an_adapter_alone_are_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_bytes(b"weights")
    with pytest.raises(PrunelensError, match=rf"found an adapter \({name}\)"):
        load(checkpoint)


@pytest.mark.parametrize("content", ["null", "[]", "", "{", "3"])
def test_a_damaged_adapter_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "adapter_config.json").write_text(content)
    with pytest.raises(PrunelensError, match=r"adapter_config\.json: expected an object in JSON"):
        load(checkpoint)


def test_an_adapter_of_the_hub_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_adapter(checkpoint)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(checkpoint))
    with pytest.raises(PrunelensError, match="found an adapter"):
        load("someone/adapter")


class Adapted(nn.Linear):
    """Stands for a layer that peft has put in."""


Adapted.__module__ = "peft.tuners.lora.layer"


def test_adapters_in_memory_are_refused() -> None:
    network = tiny_network("llama")
    network.model.layers[2].self_attn.q_proj = Adapted(32, 32, bias=False)
    with pytest.raises(PrunelensError, match=r"mine with adapters.*Adapted at model\.layers\.2\.self_attn\.q_proj"):
        wrap(network, name="mine")
    network = tiny_network("llama")
    network._hf_peft_config_loaded = True
    with pytest.raises(PrunelensError, match=r"adapters of peft.*merge_and_unload"):
        wrap(network)


@pytest.mark.parametrize("network", ["gpt2", None, nn.Linear(2, 2), tiny_network("llama").model], ids=repr)
def test_what_is_no_whole_language_model_is_refused_in_one_sentence(network: Any) -> None:
    with pytest.raises(PrunelensError, match=rf"found {type(network).__name__}") as caught:
        wrap(network)
    assert len(str(caught.value)) < 200


STRAY = {
    "pytorch_model.bin": 1,
    "consolidated.safetensors": 1,
    "model.fp16.safetensors": 1,
    "original/consolidated.00.pth": 1,
    "onnx/model.onnx": 1,
    "speech-lora/adapter_model.safetensors": 1,
    "tf_model.h5": 1,
    "model-Q4.gguf": 1,
    "training_args.bin": 0,
    "optimizer.pt": 0,
    "rng_state_0.pth": 0,
    "vocab.bin.txt": 0,
    ".cache/huggingface/x.safetensors": 0,
}


@pytest.mark.parametrize(("name", "told"), STRAY.items())
def test_weights_that_nothing_reads_are_told(checkpoint: Path, name: str, told: int) -> None:
    before = load(checkpoint, device="cpu")
    (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
    (checkpoint / name).write_bytes(b"")
    model = load(checkpoint, device="cpu")
    expected = f"1 file looks like weights and is not read in {checkpoint} ({name})"
    assert model.notes == before.notes + [expected] * told
    assert (model.fingerprint, model.weight_bytes) == (before.fingerprint, before.weight_bytes)


def test_shards_beside_a_whole_file_are_told(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    for number in range(3):
        (checkpoint / f"model-{number}.safetensors").write_bytes(b"")
    notes = load(checkpoint, device="cpu").notes
    assert notes == [
        f"3 files look like weights and are not read in {checkpoint} (model-0.safetensors, model-1.safetensors, …)"
    ]


def test_code_that_is_not_run_is_told_and_is_part_of_the_name(checkpoint: Path) -> None:
    before = load(checkpoint, device="cpu").fingerprint, identify(str(checkpoint))
    path = checkpoint / "config.json"
    (checkpoint / "modeling_mine.py").write_text("raise SystemExit")
    assert (load(checkpoint, device="cpu").fingerprint, identify(str(checkpoint))) == before
    values = json.loads(path.read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    path.write_text(json.dumps(values))
    model = load(checkpoint, device="cpu")
    assert model.notes == [
        f"{checkpoint} brings Python code of its own, which was not run; transformers' llama is used"
    ]
    names = {model.fingerprint, identify(str(checkpoint))}
    (checkpoint / "modeling_mine.py").write_text("raise SystemExit(1)")
    assert not names & {load(checkpoint, device="cpu").fingerprint, identify(str(checkpoint)), *before}


def test_a_file_that_the_configuration_names_is_the_one_that_is_read(checkpoint: Path) -> None:
    before = load(checkpoint, device="cpu")
    (checkpoint / "model.safetensors").rename(checkpoint / "chosen.safetensors")
    tiny_network("llama", seed=1).save_pretrained(checkpoint / "other")
    (checkpoint / "other" / "model.safetensors").rename(checkpoint / "model.safetensors")
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": "chosen.safetensors"}))
    model = load(checkpoint, device="cpu")
    weight = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.network.state_dict()[weight], before.network.state_dict()[weight])
    assert model.weight_bytes == before.weight_bytes
    assert len(model.notes) == 1
    assert "(model.safetensors)" in model.notes[0]
