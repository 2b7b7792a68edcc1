"""What goes with the weights of a saved checkpoint: settings and files that mean what they meant before."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import logging as transformers_logging

from conftest import tiny_network, tiny_tokenizer
from prunelens.api import prune
from prunelens.errors import PrunelensError
from prunelens.models.opening import builtin
from prunelens.models.opening.companions import save_weights
from prunelens.models.opening.loading import load, wrap
from prunelens.models.saving.export import export
from prunelens.models.surgery.drop import NOTHING, Drop

TEXT = torch.tensor([[4, 40, 7, 90, 11]])
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature without do_sample": {"max_length": 12, "temperature": 0.9, "top_p": 0.6},
    "top_k alone": {"top_k": 3},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "temperature 0": {"do_sample": True, "temperature": 0.0},
    "several ends": {"eos_token_id": [2, 40, 41]},
    "beams without beams": {"num_beams": 1, "early_stopping": True, "length_penalty": 0.5},
    "forced and suppressed": {"forced_eos_token_id": 9, "suppress_tokens": [5, 6]},
    "penalties": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "scores without a dict": {"output_scores": True},
    "unknown and removed keys": {"typical_p": 0.3, "diversity_penalty": 0.4, "made_up": 3},
}
LEGACY: dict[str, dict[str, Any]] = {
    "length and penalty": {"max_length": 9, "repetition_penalty": 1.3},
    "temperature": {"temperature": 0.4, "top_p": 0.5},
    "sampling": {"do_sample": True, "temperature": 0.4},
}
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about such settings


def settings_of(folder: Path) -> dict[str, Any]:
    """What plain transformers would generate with."""
    found = AutoModelForCausalLM.from_pretrained(folder).generation_config.to_dict()
    return {name: value for name, value in found.items() if name != "transformers_version"}


def texts_of(folder: Path) -> set[tuple[int, ...]]:
    """What plain `generate` writes in four tries."""
    network = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    written = [network.generate(TEXT, attention_mask=torch.ones_like(TEXT), max_new_tokens=8) for _ in range(4)]
    return {tuple(one[0].tolist()) for one in written}


def rewrite(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("values", SETTINGS.values(), ids=SETTINGS)
def test_settings_for_generating_are_copied(checkpoint: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    content = json.dumps(IDS | values, indent=3)
    (checkpoint / "generation_config.json").write_text(content)
    prune(load(checkpoint, device="cpu"), "drop-block@1", tmp_path / "pruned")
    assert (tmp_path / "pruned" / "generation_config.json").read_text() == content
    assert settings_of(tmp_path / "pruned") == settings_of(checkpoint)


def test_what_was_greedy_stays_greedy(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps(IDS | {"temperature": 5.0, "top_p": 0.9}))
    export(load(checkpoint, device="cpu"), tmp_path / "pruned", NOTHING)
    assert len(texts_of(checkpoint)) == 1
    assert texts_of(tmp_path / "pruned") == texts_of(checkpoint)
    (checkpoint / "generation_config.json").write_text(json.dumps(IDS | {"do_sample": True, "temperature": 5.0}))
    export(load(checkpoint, device="cpu"), tmp_path / "pruned", NOTHING)
    assert len(texts_of(checkpoint)) > 1
    assert texts_of(tmp_path / "pruned") == texts_of(checkpoint)


@pytest.mark.parametrize("values", LEGACY.values(), ids=LEGACY)
@pytest.mark.parametrize("beside", [False, True])
def test_settings_of_old_inside_config_json_keep_their_meaning(
    checkpoint: Path, tmp_path: Path, values: dict[str, Any], beside: bool
) -> None:
    """They count only where there is no generation_config.json."""
    rewrite(checkpoint / "config.json", **values)
    if not beside:
        (checkpoint / "generation_config.json").unlink()
    expected = settings_of(checkpoint)
    assert all(expected[name] == value for name, value in values.items()) is not beside
    prune(load(checkpoint, device="cpu"), "drop-mlp@1", tmp_path / "pruned")
    assert settings_of(tmp_path / "pruned") == expected


@pytest.mark.parametrize("values", [SETTINGS[name] for name in ("temperature without do_sample", "temperature 0")])
def test_settings_of_a_quantised_checkpoint_keep_their_meaning(
    checkpoint: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps(IDS | values))
    prune(load(checkpoint, device="cpu"), "quantize:int8", tmp_path / "pruned")
    assert settings_of(tmp_path / "pruned") == settings_of(checkpoint)


@pytest.mark.parametrize("values", SETTINGS.values(), ids=SETTINGS)
def test_settings_of_a_model_in_memory_are_written(tmp_path: Path, values: dict[str, Any]) -> None:
    network = tiny_network("llama")
    network.generation_config = GenerationConfig(**(IDS | values))
    expected = network.generation_config.to_dict()
    export(wrap(network, tiny_tokenizer()), tmp_path / "pruned", Drop(mlp=frozenset({0})))
    found = settings_of(tmp_path / "pruned")
    assert found == {name: value for name, value in expected.items() if name != "transformers_version"}
    assert network.generation_config.to_dict() == expected


def test_settings_changed_after_opening_are_written(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint, device="cpu")
    model.network.generation_config.repetition_penalty = 1.9
    export(model, tmp_path / "pruned", NOTHING)
    assert settings_of(tmp_path / "pruned") == settings_of(checkpoint) | {"repetition_penalty": 1.9}


CONFIGS: dict[str, dict[str, Any]] = {
    "keys that nobody knows": {"my_key": {"a": [1, None]}, "task_specific_params": {"x": 1}, "use_cache": False},
    "rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    "rope of old": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5, "rope_parameters": None},
    "dtype of old": {"dtype": None, "torch_dtype": "float32", "_name_or_path": "elsewhere"},
    "labels": {"id2label": {"0": "a", "1": "b"}},
}


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_config_json_means_the_same(checkpoint: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    rewrite(checkpoint / "config.json", **values)
    export(load(checkpoint, device="cpu"), tmp_path / "pruned", Drop(mlp=frozenset({2})))
    before, after = (AutoConfig.from_pretrained(one).to_dict() for one in (checkpoint, tmp_path / "pruned"))
    assert after.pop("prunelens")["dropped"] == {"attention": [], "mlp": [2]}
    assert {**after, "_name_or_path": ""} == {**before, "_name_or_path": ""}


def test_tokenizer_files_are_copied_byte_by_byte(checkpoint: Path, tmp_path: Path) -> None:
    rewrite(checkpoint / "tokenizer_config.json", add_eos_token=True, made_up=[1], chat_template="{{ messages }}")
    others = {
        "chat_template.jinja": "{{ messages[0].content }}\n\n",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "preprocessor_config.json": '{"do_resize":  true}',
        "processor_config.json": "{}",
        "special_tokens_map.json": '{"eos_token":"<eos>"}',
        "added_tokens.json": "{}",
        "tokenizer.model": "not read",
        "merges.txt": "#version: 0.2\n",
        "LICENSE": "all rights",
    }
    (checkpoint / "additional_chat_templates").mkdir()
    for name, content in others.items():
        (checkpoint / name).write_text(content)
    for name in ("README.md", "trainer_state.json", "optimizer.pt", "model.safetensors.index.fp16.json", ".hidden"):
        (checkpoint / name).write_text("{}")
    export(load(checkpoint, device="cpu"), tmp_path / "pruned", Drop(block=frozenset({0})))
    for name in (*others, "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "pruned" / name).read_bytes() == (checkpoint / name).read_bytes(), name
    expected = {name.partition("/")[0] for name in others} | {"tokenizer.json", "tokenizer_config.json"}
    expected |= {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "pruned").iterdir()} == expected
    shutil.rmtree(checkpoint / "additional_chat_templates")
    before, after = (AutoTokenizer.from_pretrained(one) for one in (checkpoint, tmp_path / "pruned"))
    assert before("w4 w5").input_ids == after("w4 w5").input_ids


def test_a_source_that_is_gone_is_named_and_nothing_is_left(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint, device="cpu")
    shutil.rmtree(checkpoint)
    with pytest.raises(PrunelensError, match="still there"):
        export(model, tmp_path / "pruned", NOTHING)
    assert list(tmp_path.iterdir()) == []


def test_writing_a_checkpoint_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Libraries show a bar of their own, and only at the first use: the built-in model is converted then."""
    transformers_logging.enable_progress_bar()
    save_weights(tiny_network("llama"), tmp_path / "weights")
    network, tokenizer = tiny_network("llama"), tiny_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunelens.models.opening.gguf.read_gguf", lambda path: (network, tokenizer))
        builtin._fill(tmp_path / "model.gguf", tmp_path / "built-in")
    assert (tmp_path / "built-in" / "model.safetensors").is_file()
    assert capfd.readouterr() == ("", "")
